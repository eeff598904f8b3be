"""Whether a model can be loaded, as far as its files tell.

`python -m workers.check MODEL DRAFT_MODEL DRAFT_KIND ADAPTERS`, each as the setting of its name.
Files are fetched where they are missing; configuration, architecture and the sizes of all tensors are checked, and no
weight is read. Ends with 0, or with a message on stderr and EXIT_CONFIG.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import mlx.core as mx
import msgspec

from shared import adapters, config, gguf_file
from shared.config import Settings
from shared.errors import BadConfig, BadModel
from shared.model_files import resolve
from shared.supervise import EXIT_CONFIG
from workers import no_torch


def check(settings: Settings) -> None:
    """Raises BadModel, BadConfig."""
    from workers.adapters import install
    from workers.build_drafter import draft_config
    from workers.load import folder, gguf
    from workers.models import decoder

    files = resolve(settings.model, settings)
    if files.gguf is not None:
        metadata, tensors = gguf_file.read_header(files.gguf)
        target_config = gguf.read_config(metadata, {tensor.name for tensor in tensors})
        gguf.check_sizes(target_config, tensors)
        model = decoder.Model(decoder.DecoderConfig.from_hf(target_config, settings.max_model_len))
    else:
        assert files.folder is not None, "a model is a folder or a GGUF file"
        model, target_config = folder.load_folder(files.folder, settings.max_model_len)
    places = adapters.parse(settings.adapters)
    if places:
        install(model, places, mx.float32)
    draft_config(settings, target_config)


def main(argv: Sequence[str]) -> int:
    no_torch.leave_out()
    mx.set_default_device(mx.Device(mx.cpu))  # the device's memory is the target's
    try:
        words = dict(zip(("model", "draft_model", "draft_kind", "adapters"), argv, strict=True))
        check(msgspec.structs.replace(config.load(), **words))
    except (BadConfig, BadModel) as error:
        print(error.message, file=sys.stderr)
        return EXIT_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
