"""Practice dialogues for fine-tuning and the questions that tell whether it worked, both from a seed.

    write_dialogues("chats.jsonl", 5000, seed=0)
    evaluation = evaluate(held_out_tasks(200), complete)     # complete: prompts -> texts
"""

from __future__ import annotations

from moonbase.synth.dialogues import make_dialogues, write_dialogues
from moonbase.synth.evaluation import Evaluation, evaluate, held_out_tasks
from moonbase.synth.tools import TOOLS, run_tool

__all__ = ["TOOLS", "Evaluation", "evaluate", "held_out_tasks", "make_dialogues", "run_tool", "write_dialogues"]
