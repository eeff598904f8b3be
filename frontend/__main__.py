"""`python -m frontend`: load the tokenizer, then serve until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import gc
import sys

from frontend.engine import EngineClient
from frontend.media.loader import MediaLoader
from frontend.media.processors import processor_of
from frontend.server import Server
from frontend.service import Service
from frontend.tokenizer import load
from shared import config, log, model_files
from shared.errors import BadConfig, BadModel
from shared.supervise import EXIT_CONFIG


def main() -> int:
    try:
        settings = config.load()
        logger = log.set_up("frontend", settings.log_level)
        config.prepare_run_folder(settings)
        files = model_files.resolve(settings.model, settings)
        processor = processor_of(files.folder) if files.folder is not None else None
        media = MediaLoader(processor, settings) if processor is not None else None
        service = Service(settings, files.name, load(files), EngineClient(settings), media)
    except (BadConfig, BadModel) as error:
        print(f"frontend: {error.message}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    server = Server(service)
    # The vocabulary and the modules stay for good; without them a full collection takes 1 ms, not 30.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        logger.info("serving %s on http://%s:%d", files.name, settings.host, settings.port)
        runner.run(server.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
