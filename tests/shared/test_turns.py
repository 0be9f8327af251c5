"""Who may have how much of a service, and whose turn it is."""

from __future__ import annotations

from wherry_shared.bus.turns import Backlog, Shares
from wherry_shared.context import Identity

ADMIN = Identity("admin", "admin")
A, B, C, D = (Identity(f"tenant-{name}", "tenant", name) for name in "abcd")


def fill(shares: Shares, who: Identity, most: int) -> int:
    taken = 0
    while shares.fits(who, most):
        shares.take(who)
        taken += 1
    return taken


def test_a_tenant_has_its_part_and_all_leave_one() -> None:
    shares = Shares()
    assert [fill(shares, who, 16) for who in (A, B, C, D, ADMIN)] == [4, 4, 4, 1, 3]
    assert not shares.fits(Identity("tenant-e", "tenant", "e"), 16)
    for who, count in ((A, 4), (B, 4), (C, 4), (D, 1), (ADMIN, 3)):
        for _ in range(count):
            shares.give(who)
    assert shares.taken == 0 and fill(shares, A, 16) == 4


def test_one_that_is_larger_than_its_part_is_let_in_alone() -> None:
    shares = Shares()
    assert shares.fits(A, 100, 90)
    shares.take(A, 90)
    assert not shares.fits(A, 100) and shares.fits(B, 100, 10) and not shares.fits(B, 100, 11)


def test_callers_take_turns_and_each_ones_requests_keep_their_order() -> None:
    backlog = Backlog[str]()
    for who, name in ((A, "a1"), (A, "a2"), (A, "a3"), (ADMIN, "x1"), (B, "b1"), (ADMIN, "x2")):
        backlog.put(who, 10, name)
    taken = [backlog.take(lambda who: who is not B) for _ in range(6)]
    assert taken == ["a1", "x1", "a2", "x2", "a3", None]
    assert len(backlog) == 1 and backlog.take(lambda who: True) == "b1"
    assert not len(backlog) and backlog.take(lambda who: True) is None


def test_the_backlog_is_bounded_by_number_and_by_bytes() -> None:
    backlog = Backlog[int]()
    for number in range(4):
        assert backlog.fits(A, 10, 16, 1000)
        backlog.put(A, 10, number)
    assert not backlog.fits(A, 10, 16, 1000) and backlog.fits(A, 10, 100, 1000)
    assert not backlog.fits(A, 300, 100, 1000) and backlog.fits(B, 300, 16, 1000)
