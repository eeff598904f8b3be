"""How conversations begin: system prompts, and words that steer a user turn which the target then writes itself.

Source of the method: Xu et al. 2024 (Magpie), arXiv:2406.08464: a chat model that is given the bare start of a user
turn continues with a plausible request.
"""

from __future__ import annotations

from dataclasses import dataclass

from frontend import tokenizer as text
from frontend.chat_template import ChatTemplate
from shared.errors import BadModel, InvalidRequest
from shared.model_files import ModelFiles

SHARE_PLAIN = 0.45  # of prompts without an opening

SYSTEM = (
    None,  # what the template says itself
    "You are a helpful assistant.",
    "You are a careful programming assistant. Answer with code where it helps.",
    "You are a patient mathematics teacher who shows each step.",
    "You answer briefly.",
    "You are a friendly conversation partner.",
    "You write clear, well organised prose.",
    "You summarise texts faithfully.",
    "You extract facts and answer in JSON.",
    "You are an editor who corrects and improves texts.",
    "You are a translator.",
    "You are a science tutor for pupils.",
    "You are a travel guide.",
    "You plan projects and write lists of steps.",
    "You are a creative writer.",
)
SHARE_DEFAULT_SYSTEM = 0.55

OPENINGS = (
    "Write a Python function", "Write a function that", "Write a SQL query", "Write a bash script", "Fix the bug in",
    "Explain the following code:", "Refactor this", "Write a class", "Write a regular expression", "Write unit tests",
    "Summarize the following text:", "Summarize", "Rewrite the following", "Translate", "Correct the grammar",
    "Extract", "Convert the following to JSON:", "Return a JSON object", "List", "Create a table",
    "What is", "What are", "Why", "How do I", "How does", "How can I", "When did", "Who was", "Where",
    "Explain", "Explain to a child", "Compare", "Describe", "Give me an example of", "Give me advice on",
    "Solve", "Calculate", "If a train", "A shop sells", "Find the value of", "Prove that", "How many",
    "Write a short story", "Write a poem", "Write an email", "Write a letter", "Write a blog post", "Write a dialogue",
    "Suggest a name", "Plan a trip", "Plan a meal", "I need help with", "I am trying to", "Can you help me",
    "Hi", "Tell me about", "Do you think", "Classify", "Is it true that", "Here is a list:",
)  # fmt: skip


@dataclass(frozen=True)
class Openings:
    """Token ids: prefixes with the share of prompts that begin so, and what follows a user turn."""

    prefixes: list[list[int]]
    shares: list[float]
    turn: list[int]  # its first token ends the user's turn, the rest opens the answer
    ends: list[int]  # tokens that end an answer


def build(files: ModelFiles) -> Openings:
    """Raises BadModel: no chat template, or one whose user turn does not end with a token of its own."""
    model = text.load(files)
    if model.chat_template is None:
        raise BadModel(f"{files.name} has no chat template to synthesise prompts from")
    template = ChatTemplate(model.chat_template, model.special_texts)
    mark = "PLACEHOLDER"

    def encode(part: str) -> list[int]:
        return text.encode(model.tokenizer, part, add_special_tokens=False)

    def parts(system: str | None) -> tuple[str, str]:
        messages = [{"role": "system", "content": system}] if system is not None else []
        rendered = template.render([*messages, {"role": "user", "content": mark}])
        before, _, after = rendered.partition(mark)
        return before, after

    turn = encode(parts(None)[1])
    if not turn or turn[0] not in model.eos_token_ids:
        raise BadModel(f"{files.name}: a user turn does not end with an end token, so its end cannot be seen")
    prefixes: list[list[int]] = []
    shares: list[float] = []
    for index, system in enumerate(SYSTEM):
        try:
            before, _ = parts(system)
        except InvalidRequest:  # a template without system messages
            continue
        share = SHARE_DEFAULT_SYSTEM if index == 0 else (1 - SHARE_DEFAULT_SYSTEM) / (len(SYSTEM) - 1)
        prefixes.append(encode(before))
        shares.append(share * SHARE_PLAIN)
        for opening in OPENINGS:
            prefixes.append(encode(before + opening))
            shares.append(share * (1 - SHARE_PLAIN) / len(OPENINGS))
    total = sum(shares)
    return Openings(prefixes, [s / total for s in shares], turn, list(model.eos_token_ids))
