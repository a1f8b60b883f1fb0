import time, json, torch
torch.set_num_threads(1)
from ftlab.pipeline.models import load
from ftlab.pipeline import data, fast
from ftlab.paths import DATA
from ftlab.scratch.lora import add_lora
fast.keep_memory()
model, tok = load("micro")
rows = data.triage_rows(DATA/"triage"/"train.jsonl")
R=[data.render(r,tok) for r in rows]
n=sorted(len(r.input_ids) for r in R); print(len(n), n[::200]); print(tok.decode(R[0].input_ids)); 
print(sum(R[0].completion_mask), R[0].input_ids[:10])
for name in("validation","test"):
    q=[data.render(r,tok) for r in data.triage_rows(DATA/"triage"/f"{name}.jsonl")]; print(name,len(q),sum(len(x.input_ids)<=128 for x in q))
short=[r for r in R if len(r.input_ids)<=112]; print(len(short))
ALL=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]
def batch(rs):
    T=max(len(r.input_ids) for r in rs)
    ids=torch.zeros(len(rs),T,dtype=torch.long); m=torch.zeros(len(rs),T,dtype=torch.bool)
    for i,r in enumerate(rs): ids[i,:len(r.input_ids)]=torch.tensor(r.input_ids); m[i,:len(r.input_ids)]=torch.tensor(r.completion_mask,dtype=torch.bool)
    return ids,m
def loss(model,ids,m):
    h=model.model(input_ids=ids,use_cache=False).last_hidden_state[:,:-1][m[:,1:]]
    return torch.nn.functional.cross_entropy(model.lm_head(h), ids[:,1:][m[:,1:]])
for mode in ("full","lora"):
    model,_=load("micro")
    if mode=="lora": add_lora(model,ALL,16,32)
    ps=[p for p in model.parameters() if p.requires_grad]
    opt=torch.optim.AdamW(ps,lr=1e-3)
    for s in range(8):
        if s==2: t=time.process_time()
        ids,m=batch(short[s*8:s*8+8])
        l=loss(model,ids,m); l.backward(); opt.step(); opt.zero_grad()
    print(mode,(time.process_time()-t)/6, l.item())
