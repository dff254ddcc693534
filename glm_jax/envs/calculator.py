"""Environment `calculator`: what is 8*7-5, with a tool that does one operation a call."""

import re
from collections.abc import Mapping, Sequence

from data.chat_messages import arguments_of
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.rollouts.task import Reward, Task

OPERATIONS = {"*": int.__mul__, "+": int.__add__, "-": int.__sub__}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": PARAMETERS}}
QUESTION = re.compile(r"What is ([0-9]{1,4}\*[0-9]{1,4})([-+][0-9]{1,4})\?")


def result(expression: str) -> str:
    found = re.fullmatch(r"(-?[0-9]{1,9})([-+*])(-?[0-9]{1,9})", expression.replace(" ", ""))
    if found is None:  # the model reads it and may try again
        return "error: must be one operation on two whole numbers, as 12*34"
    return str(OPERATIONS[found[2]](int(found[1]), int(found[3])))


class Calculator:
    """The model may call the calculator in two turns; the third is its answer."""

    def reset(self, task: Task, seed: int) -> Start:
        self.answer, self.turns = str(task.answer), 0
        return Start(task.messages, [TOOL])

    def step(self, message: Mapping) -> Step:
        self.turns += 1
        calls = message.get("tool_calls", ())
        if not calls or self.turns == 3:
            right = message["content"].strip() == self.answer
            return Step([], True, Reward(float(right), {"turns": float(self.turns)}))
        asked = [arguments_of(call["function"], "call").get("expression") for call in calls]
        return Step([{"role": "tool", "content": result(str(a))} for a in asked], False)


def expert(messages: Sequence[Mapping]) -> Mapping:
    product, rest = QUESTION.findall(messages[0]["content"])[0]
    results = [m["content"] for m in messages if m["role"] == "tool"]
    if len(results) == 2:
        return {"role": "assistant", "content": results[1]}
    expression = results[0] + rest if results else product
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}


def check(tasks: Sequence[Task]):
    for task in tasks:
        if not QUESTION.fullmatch(question := str(task.messages[0]["content"])):
            raise ValueError(f"task {task.id!r}: {question!r} must read like 'What is 8*7-5?'")
        product, rest = QUESTION.findall(question)[0]
        if str(task.answer) != (right := result(result(product) + rest)):
            raise ValueError(f"task {task.id!r}: answer={task.answer!r} must be {right}")


KIND = Kind(Calculator, check, lambda task: expert)
