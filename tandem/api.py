"""`load`, `generate` and `stream_generate`: a model in this process, without a server.

    from tandem import load, generate

    model = load("org/model")
    print(generate(model, [{"role": "user", "content": "Hello"}], max_tokens=64).text)

The same code runs as behind the HTTP API, sampler, prefix cache, drafters and batching included, so a greedy or seeded
request gives the same tokens here and there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from tandem.options import Message, Options
from tandem.results import Result

if TYPE_CHECKING:
    from tandem.local.model import LocalModel
    from tandem.local.request import Prompt
    from tandem.local.stream import PieceStream


def load(
    model: str | None = None,
    draft_model: str | None = None,
    **settings: Any,  # noqa: ANN401 - of shared.config.Settings
) -> LocalModel:
    """Load a model, and a drafter for it, into this process.

    Args:
        model: a folder, a .gguf file, a Hugging Face id, or "default" (the embedded model).
        draft_model: "ngram", "auto" (the same, where it pays), "none", or a drafter as `model` is named.
        settings: of the server, by their names: adapters, dtype, max_model_len, max_num_seqs, kv_cache_bytes,
            draft_kind, draft_block_size, prefix_cache, enable_thinking and so on. What is not given is taken from the
            `TANDEM_*` variables, as for `tandem serve`.
    Returns:
        The model, warm. It holds a thread and the device's memory until it is closed.
    Raises:
        BadConfig: a setting is unknown, of a wrong type, or the server's only.
        BadModel: the files cannot be found, downloaded or loaded.
    """
    from tandem.local.model import LocalModel
    from tandem.local.settings import local_settings

    return LocalModel(local_settings(model, draft_model, settings))


def stream_generate(model: LocalModel, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> PieceStream:
    """Generate; pieces come as they are made.

    Args:
        model: what `load` gave.
        prompt: a text or token ids, which the output goes on with (no chat template is applied); a list of messages,
            which it answers; or a list of any of these, which run as one batch.
        options: `tandem.options.Options`: sampling parameters by the HTTP API's names, stop, seed, logprobs, schemas,
            thinking, tools; `images`, `videos` and `audio` by path, which stand before the last user message's text.
    Returns:
        An iterator of `Piece`; `piece.index` says to which prompt it belongs. Closing it stops what still runs.
    Raises:
        InvalidRequest: an option is unknown, out of range, or does not fit the model. Nothing has started.
        Unavailable: the model was closed.
        EngineFailure: while iterating: the engine could not finish an output.
    """
    return model.stream(prompt, **options)


@overload
def generate(model: LocalModel, prompt: str, **options: Unpack[Options]) -> Result: ...
@overload
def generate(model: LocalModel, prompt: list[int], **options: Unpack[Options]) -> Result: ...
@overload
def generate(model: LocalModel, prompt: Sequence[Message], **options: Unpack[Options]) -> Result: ...
@overload
def generate(
    model: LocalModel, prompt: list[str] | list[list[int]] | Sequence[Sequence[Message]], **options: Unpack[Options]
) -> list[Result]: ...
def generate(
    model: LocalModel,
    prompt: Any,
    **options: Unpack[Options],
) -> Result | list[Result]:
    """Generate and wait for the whole: one `Result` for one prompt, a list of them for several.

    Args and errors are those of `stream_generate`.
    """
    return model.generate(prompt, **options)
