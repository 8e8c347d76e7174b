# SPDX-License-Identifier: MIT
"""What heartbeats say: silence and its end, standstills and who causes them, slow ranks. No process, no clock."""

from dataclasses import replace

from training.peer_report import Beat, Limits, Listener, describe_standstill, slow_rank_message

LIMITS = Limits(warn_silence_s=3, fail_silence_s=6, warn_stall_s=4)
FIRST = Beat(host="b", pid=7, activity="")


def beats_at(count: int, **changes: Beat) -> dict[int, Beat | None]:
    return {1: replace(FIRST, count=count), 2: replace(FIRST, host="c", count=count)} | {
        int(name[1:]): beat for name, beat in changes.items()
    }


def test_text_form_keeps_everything():
    beat = Beat("b", 7, 3, 12, "evaluation", True, "training/x.py:8 f", True)
    assert Beat.from_text(beat.to_text()) == beat == Beat.from_text(beat.to_text().encode())
    assert Beat.from_text("none") is None and Beat.from_text(b"") is None


def test_silence_is_warned_of_once_and_its_end_told():
    listener = Listener([1, 2], LIMITS)
    listener.hear(beats_at(0), 1)
    for count in range(1, 4):
        assert listener.new_warnings() == []
        listener.hear(beats_at(count, r2=beats_at(0)[2]), 1)
    (line,) = listener.new_warnings()
    assert line.startswith("rank 2 (host c, process 7) has not been heard for 3 s") and "6 s" in line
    assert listener.new_warnings() == []
    assert listener.silent_ranks(3) == [2] and listener.silent_ranks(6) == []
    listener.hear(beats_at(9), 1)
    assert listener.new_warnings() == ["rank 2 (host c) is heard again"]
    assert listener.silent_ranks(1) == []


def test_a_rank_that_left_or_never_came_is_not_silent():
    listener = Listener([1, 2], LIMITS)
    leaving = replace(FIRST, is_leaving=True)
    for _ in range(20):
        listener.hear({1: leaving, 2: None}, 1)
    assert listener.silent_ranks(1) == [] and listener.new_warnings() == []


def test_a_pause_of_the_listener_counts_as_what_it_saw():
    """The watchdog passes at most two intervals, however long it was paused itself."""
    listener = Listener([1, 2], LIMITS)
    listener.hear(beats_at(0), 1)
    listener.hear(beats_at(0), 2)
    assert listener.silent_ranks(LIMITS.warn_silence_s) == []


def hear_standstill(listener: Listener, seconds: int, **changes: object) -> list[str]:
    lines = []
    for count in range(seconds):
        listener.hear({r: replace(b, count=count, **changes) for r, b in beats_at(0).items()}, 1)
        lines += filter(None, [listener.stall_warning()])
    return lines


def test_standstill_is_reported_again_and_again_unless_explained():
    assert len(hear_standstill(Listener([1, 2], LIMITS), 10)) == 2
    assert hear_standstill(Listener([1, 2], LIMITS), 10, activity="evaluation") == []
    listener = Listener([1, 2], LIMITS)
    for count in range(20):  # progress
        listener.hear(beats_at(count, r1=replace(FIRST, count=count, iteration=count)), 1)
        assert listener.stall_warning() is None


def test_first_iteration_may_take_long():
    assert hear_standstill(Listener([1, 2], LIMITS), 30, activity=Beat("b", 7).activity) == []


def test_who_is_behind():
    waiting = replace(FIRST, iteration=5, is_waiting=True)
    loading = replace(FIRST, iteration=5, where="training/data_loader.py:88 next_batch")
    assert describe_standstill({0: waiting, 1: loading, 2: waiting}) == (
        "The others wait for rank 1 (host b), iteration 5, in training/data_loader.py:88 next_batch"
    )
    line = describe_standstill({0: waiting, 1: replace(waiting, iteration=4), 2: waiting})
    assert "wait for rank 1 (host b), iteration 4, in other code" in line
    assert "All ranks are at iteration 5: rank 0" in describe_standstill({0: waiting, 1: waiting})


def test_slow_rank():
    hosts = ["a", "a", "b", "b"]
    assert slow_rank_message([1.0, 1.1, 0.9, 1.5], hosts) is None
    assert slow_rank_message([1.0, 1.1, 0.9, 2.1], hosts).startswith(
        "rank 3 (host b) takes 2.1 times as long as the median of the others"
    )
    assert slow_rank_message([4.0, 1.0], ["a", "b"]).startswith("rank 0 (host a) takes 4.0 times")
    assert slow_rank_message([1.0], ["a"]) is None
    assert slow_rank_message([3.0, 0.0], ["a", "b"]) is None
