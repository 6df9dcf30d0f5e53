"""What a host knows of the others: differences, a past that changed, age, and what is followed."""

from __future__ import annotations

from portd.cluster.entries import HOSTS, SERVICES, Change, HostEntry, encode_host, encode_lease, endpoint_key
from portd.cluster.view import FOLLOW_ALL_MAX_HOSTS, UNUSED_S, Position, View
from portd.core.model import Lease, Owner

HERE = Position(1, 10)


def entry(host, number=1, service="orders"):
    one = Lease(
        id=f"{host}-{number}",
        service=service,
        instance=f"{service}-{number}",
        endpoint="main",
        protocol="tcp",
        address="10.0.0.1",
        port=20000 + number,
        pool="default",
        hold="shared",
        state="bound",
        lifetime="process",
        owner=Owner(known_by="socket"),
        host=host,
        created_at=1.0,
    )
    return endpoint_key(one, host), encode_lease(one, ())


def ids(view, service="orders"):
    return {lease.id for lease in view.of_service(service)}


def synced(*entries):
    view = View("me", 10.0, "all")
    view.resync(HOSTS, {}, HERE, 0.0)
    view.resync(SERVICES, dict(entries), HERE, 0.0)
    return view


def test_own_entries_are_left_out():
    assert ids(synced(entry("me"), entry("b"))) == {"b-1"}


def test_resync_reports_only_differences():
    view = synced(entry("b", 1), entry("b", 2))
    seen = view.resync(SERVICES, dict([entry("b", 2), entry("b", 3)]), Position(1, 11), 1.0)
    assert {(one.lease.id, one.is_gone) for one in seen} == {("b-1", True), ("b-3", False)}


def test_missing_entries_stay_one_ttl_in_another_past():
    view = synced(entry("b", 1), entry("b", 2))
    assert view.is_other_past(Position(1, 9))
    assert view.is_other_past(Position(2, 99))
    view.resync(SERVICES, {}, Position(1, 2), 100.0, is_other_past=True)
    view.apply(SERVICES, [Change(*entry("b", 2))], 3, 101.0)
    assert ids(view) == {"b-1", "b-2"}
    view.review(109.9)
    assert ids(view) == {"b-1", "b-2"}
    assert [one.lease.id for one in view.review(110.0)] == ["b-1"]
    assert ids(view) == {"b-2"}


def test_changes_that_the_view_has_are_ignored():
    view = synced(entry("b"))
    assert view.apply(SERVICES, [Change(entry("b")[0], None)], 10, 1.0) == []
    assert ids(view) == {"b-1"}


def test_one_revision_reaches_every_prefix():
    view = synced()
    view.apply(HOSTS, [Change(HOSTS + "b", encode_host(HostEntry("m")))], 11, 1.0)
    view.apply(SERVICES, [Change(*entry("b"))], 11, 1.0)
    assert (set(view.hosts), ids(view)) == ({"b"}, {"b-1"})


def test_view_ages_while_nothing_is_heard():
    view = synced(entry("b"))
    assert view.stale_s(3600.0) == 3600.0
    assert ids(view) == {"b-1"}


def test_large_cluster_is_followed_by_service():
    view = View("me", 10.0)
    assert view.prefixes == (HOSTS, SERVICES)
    many = {f"{HOSTS}h{n}": encode_host(HostEntry("m", services={"mail": 1})) for n in range(FOLLOW_ALL_MAX_HOSTS + 1)}
    view.resync(HOSTS, many, HERE, 0.0)
    view.resync(SERVICES, dict([entry("b")]), HERE, 0.0)
    assert [one.is_gone for one in view.review(1.0)] == [True]
    assert view.prefixes == (HOSTS,)
    assert "mail" in view.services()
    assert view.ask("orders", 1.0)
    assert view.unsynced == (f"{SERVICES}orders/",)
    view.resync(f"{SERVICES}orders/", dict([entry("b")]), HERE, 1.0)
    assert not view.ask("orders", 2.0)
    view.review(2.0 + UNUSED_S + 1)
    assert view.prefixes == (HOSTS,)
    assert ids(view) == set()


def test_foreign_keys_and_values_change_nothing():
    view = synced()
    view.apply(SERVICES, [Change(SERVICES + "x", b"1"), Change(SERVICES + "a/B!/c/d", b"{}")], 11, 1.0)
    view.apply(SERVICES, [Change(entry("b")[0], b"{}")], 12, 1.0)
    assert view.leases() == []
    assert view.malformed_count == 1
