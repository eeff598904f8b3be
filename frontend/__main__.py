"""`python -m frontend`: load the tokenizer, then serve until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import gc
import sys

from frontend import model_side
from frontend.engine import EngineClient
from frontend.server import Server
from frontend.service import Service
from frontend.tracing import Tracing
from shared import config, log
from shared import served as served_model
from shared.errors import BadConfig, BadModel
from shared.supervise import EXIT_CONFIG


def main() -> int:
    try:
        settings = config.load()
        served = served_model.read(settings)
        logger = log.set_up("frontend", settings.log_level)
        config.prepare_run_folder(settings)
        side = model_side.load((served.previous or served.choice).applied(settings))
        tracing = Tracing() if settings.tracing else None
        service = Service(settings, side, EngineClient(settings), tracing)
    except (BadConfig, BadModel) as error:
        print(f"frontend: {error.message}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    server = Server(service)
    # The vocabulary and the modules stay for good; without them a full collection takes 1 ms, not 30.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        logger.info("serving %s on http://%s:%d", side.model_name, settings.host, settings.port)
        runner.run(server.serve())
    if tracing is not None:
        tracing.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
