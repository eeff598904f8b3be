"""Beyond the memory budget nothing new is taken; what runs goes on."""

from __future__ import annotations

from shared.messages import Heartbeat
from tests.scheduler.test_core import Rig
from tests.support.fake_target import greedy, worker_info

LIMIT = 1000


def test_no_new_requests_beyond_the_limit_and_again_below_it() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT)
    rig.start_target()

    def tell(instance: str, **memory: int) -> None:
        rig.send(instance, Heartbeat(instance_id=instance, memory_bytes=memory))

    rig.submit("before", [1, 2], 10)
    tell("front", resident=300)
    tell(rig.target_id, resident=200, device=500, device_cache=100)  # the larger counts
    assert rig.core.memory.used_bytes == 900
    tell("front", resident=400)
    rig.submit("beyond", [1, 2], 10)
    assert rig.rejected["beyond"].code == "rate_limit_exceeded"
    assert (rig.rejected["beyond"].retry_after_s or 0) >= 1
    rig.submit("resumed", [1, 2], 10, output_token_ids=greedy([1, 2], 3))
    tell("front", resident=300)
    rig.submit("below", [1, 2], 10)
    rig.assert_idle()
    assert set(rig.rejected) == {"beyond"}
    assert rig.tokens("before") == rig.tokens("below") == greedy([1, 2], 10)
    assert rig.tokens("resumed") == greedy([1, 2], 10)[3:]


def test_a_process_that_is_gone_holds_no_memory() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT)
    rig.start_target()
    rig.send(rig.target_id, Heartbeat(instance_id=rig.target_id, memory_bytes={"resident": 5000}))
    rig.start_target()
    assert rig.core.memory.used_bytes == 0
    rig.submit("a", [1], 3)
    rig.assert_idle()
    assert not rig.rejected
