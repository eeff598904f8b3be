"""What the frontend knows of the model that is served: how text, chats, media and grammars become tokens and back."""

from __future__ import annotations

from frontend import output_parser, tokenizer
from frontend.chat_template import ChatTemplate
from frontend.grammar import GrammarChecker
from frontend.media.loader import MediaLoader
from frontend.media.processors import processor_of
from frontend.pieces import Pieces
from frontend.segments import SegmentTokens
from frontend.tokenizer import ModelText
from shared import adapters, model_files
from shared.config import Settings
from shared.errors import BadConfig


class ModelSide:
    """Immutable; a change of the model makes a new one.

    Raises:
        BadConfig: a setting names a parser that does not exist, or adapters that cannot be told apart.
        BadModel: the chat template does not parse.
    """

    def __init__(self, settings: Settings, model_name: str, text: ModelText, media: MediaLoader | None = None) -> None:
        self.settings = settings  # that name this model
        self.model_name = model_name
        self.text = text
        self.media = media  # None: the model takes text only
        self.pieces = Pieces(text.tokenizer)
        self.segments = SegmentTokens(text.tokenizer)
        self.template = ChatTemplate(text.chat_template, text.special_texts) if text.chat_template else None
        self.output_format = output_parser.choose(settings, text.chat_template, text.tokenizer)
        self.grammars = GrammarChecker(text)
        self.names = {"", "default", model_name, settings.model, settings.model_name}
        self.adapters = adapters.parse(settings.adapters)
        for name in self.names & self.adapters.keys():
            raise BadConfig(f"adapters: {name!r} is a name of the model itself")


def load(settings: Settings) -> ModelSide:
    """Reads the model's files. Raises BadConfig, BadModel."""
    files = model_files.resolve(settings.model, settings)
    text = tokenizer.load(files)
    processor = processor_of(files.folder, text.tokenizer.token_to_id) if files.folder is not None else None
    media = MediaLoader(processor, settings) if processor is not None else None
    return ModelSide(settings, files.name, text, media)
