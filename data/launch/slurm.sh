#!/bin/bash
# Two machines of 8 GPUs under SLURM, from the repository's folder: sbatch data/launch/slurm.sh
#SBATCH --job-name=ftlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher a machine; it starts a process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue                    # sent back to the queue, the run goes on from its last whole checkpoint
set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1              # fetch the model first: compute nodes often have no network
export CONFIG="${CONFIG:-data/launch/fsdp2.yaml}"   # or ddp.yaml, zero3.yaml
export EXPECTS="${EXPECTS:-FSDP}"                   # what accelerate calls it: MULTI_GPU, DEEPSPEED
export SETTINGS="${SETTINGS:-data/launch/sft.yaml}"
export PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)   # head ends early, and pipefail takes it ill
export OUTPUT="runs/slurm/$SLURM_JOB_ID"   # sent back to the queue, a job keeps its number
# The first process writes trainer_state.json last, and a } alone on its line ends it: a checkpoint that was still being
# written when the run stopped is passed over. (Another process's random state, a small file, may come later.)
# At first there is none.
LAST=$(grep -lx '}' "$OUTPUT"/checkpoint-*/trainer_state.json 2> /dev/null | sort -V | sed -n '$p' || true)
LAST=${LAST%/trainer_state.json}
export MAIN LAST

# In single quotes: each machine puts in its own SLURM_NODEID. The output folder must lie on a shared file system.
srun bash -c 'accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" --main_process_port 29500 \
    data/launch/sft.py --config "$SETTINGS" --output_dir "$OUTPUT" --expects "$PROCESSES $EXPECTS" \
    ${LAST:+--resume_from_checkpoint "$LAST"}'
