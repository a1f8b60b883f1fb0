"""`ask` as a task of Inspect: the 132 questions of data/ask/hand_test.jsonl, right by execution on ten tables.

make harness                                            # once: .venv-harness
export ASK_BASE_URL=http://127.0.0.1:8080/v1 ASK_API_KEY=none
PYTHONPATH=. .venv-harness/bin/inspect eval data/harness/ask_task.py --model openai-api/ask/model
"""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Score, accuracy, scorer, stderr
from inspect_ai.solver import generate

from ftlab.paths import DATA
from ftlab.tasks.ask import is_right


def sample(row: dict) -> Sample:
    system, user = (message["content"] for message in row["prompt"])
    messages = [ChatMessageSystem(content=system), ChatMessageUser(content=user)]
    return Sample(input=messages, target=row["completion"][0]["content"], id=row["id"])


@scorer(metrics=[accuracy(), stderr()])
def by_execution():
    async def score(state, target):
        answer = state.output.completion
        return Score(value=float(is_right(answer, target.text)), answer=answer)

    return score


@task
def ask():
    questions = json_dataset(str(DATA / "ask" / "hand_test.jsonl"), sample)
    greedy = GenerateConfig(temperature=0, max_tokens=80)
    return Task(dataset=questions, solver=generate(), scorer=by_execution(), config=greedy)
