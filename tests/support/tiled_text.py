"""Tokenizers and the chat template of models whose images come in tiles (Idefics3, SmolVLM), tiny."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
# As the two families' tokenizers have it: Idefics3's writes places and the whole's name letter by letter.
SPECIAL = {
    "idefics3": ("<|start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"),
    "smolvlm": ("<|start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *PLACES),
}
# It goes through the parts of a content, and knows no videos, as the released ones.
TEMPLATE = (
    "<|start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make_tokenizer(model_type: str) -> Tokenizer:
    """Every byte is a token, and so are two line ends, which lie before the whole image."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL[model_type]])
    return tokenizer


MODEL_TYPES = tuple(SPECIAL)
TOKENIZERS = {model_type: make_tokenizer(model_type) for model_type in MODEL_TYPES}
IMAGE: int = TOKENIZERS["smolvlm"].token_to_id("<image>")  # the same in both
