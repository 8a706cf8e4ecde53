"""A job over a bad network, with crashes: each release is the exact aggregate of who survived."""

import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from umbel_common.adapters.vector import adapter_digest, initial_vector, merge
from umbel_common.canonical import decode
from umbel_common.errors import JobFailed
from umbel_common.plans.plan import Aggregation
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.transcript import AttemptAborted, Entry
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import (
    FillReply,
    MaskPreparedRequest,
    MaskRequest,
    ShareReply,
    TogetherReply,
    TrainReply,
    UnmaskReply,
    open_reply,
    request_digest,
    seal_reply,
)
from umbel_common.secagg.encoding import decode_sum, encoding_of
from umbel_common.secagg.messages import EncryptedShare, KeyAdvert
from umbel_common.secagg.participant import Prepared
from umbel_common.trust.identity import open_signed, sign
from umbel_server.messaging.link import Step

THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)

MakeSetting = Callable[..., Any]


class Crash(Exception):
    """The server's process ends here."""


class BadLink:
    """Loses, doubles, delays, swaps and garbles messages, each so often; crashes the server."""

    def __init__(self, sites: dict[str, Any], seed: int, rate: float, crashes: float) -> None:
        self.sites = sites
        self.random = random.Random(seed)
        self.rate = rate
        self.crashes = crashes
        self.delayed: list[tuple[str, bytes]] = []

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        arriving, self.delayed = self.delayed, []
        for site, sealed in requests:
            arriving += self.deliver(site, sealed)
        self.random.shuffle(arriving)
        for message in arriving:
            if self.random.random() < self.crashes:
                raise Crash
            yield message

    def deliver(self, site: str, sealed: bytes) -> list[tuple[str, bytes]]:
        """What of one request's answer arrives at once."""
        if self.random.random() >= self.rate:
            return [(site, self.sites[site].handle(sealed))]
        match self.random.randrange(6):
            case 0:
                return []
            case 1:
                self.delayed.append((site, self.sites[site].handle(sealed)))
                return []
            case 2:
                return [(site, self.sites[site].handle(sealed))] * 2
            case 3:
                # The site hears the request twice; its second answer is another one.
                return [(site, self.sites[site].handle(sealed)) for _ in range(2)]
            case 4:
                other = self.random.choice(sorted(self.sites))
                return [(other, self.sites[site].handle(sealed))]
        reply = self.sites[site].handle(sealed)
        return [(site, self.random.choice([b"", os.urandom(80), reply[:-1], reply + b"!"]))]


def check_releases(setting: Any, job: Any) -> None:
    """Each release is what its survivors' own vectors give, to the last bit."""
    vector = initial_vector(setting.plan)
    assert job.releases[0].adapter == adapter_digest(setting.plan.digest(), vector)
    headers = {
        (header.round, header.attempt): header
        for signed in setting.journal.headers("job")
        for header in [open_signed(signed, HEADER_VERSIONS, setting.roster.operator)]
    }
    assert len(headers) == len(setting.journal.headers("job"))
    for release in job.releases[1:]:
        key = (release.round, release.attempt)
        vectors = [setting.sites[site].vectors[key] for site in release.survivors]
        assert len(vectors) >= setting.plan.aggregation.threshold
        total = np.sum(vectors, axis=0, dtype=vectors[0].dtype)
        encoding = encoding_of(setting.plan, len(headers[key].cohort))
        weight, mean = decode_sum(total, encoding)
        vector = merge(vector, mean, setting.plan, release.round)
        assert release.total_weight == weight == len(vectors)
        assert release.adapter == adapter_digest(setting.plan.digest(), vector)


def run_until_finished(setting: Any, seed: int, rate: float, crashes: float) -> None:
    """Starts the job again after each crash or failure; the network gets better in the end."""
    for turn in range(12):
        calm = turn >= 8
        setting.link = BadLink(
            setting.sites, seed + turn, 0.0 if calm else rate, 0.0 if calm else crashes
        )
        try:
            setting.job(attempts=4).run()
        except (Crash, JobFailed) as error:
            event(type(error).__name__)
            # A new process opens the journal again.
            setting.journal.close()
            setting.journal = type(setting.journal)(setting.folder / "journal.sqlite")
        else:
            return
    raise AssertionError("a job did not finish although nothing went wrong any more")


@pytest.mark.parametrize("examples", [10, pytest.param(60, marks=pytest.mark.full)])
def test_a_job_over_a_bad_network_releases_exact_aggregates_and_finishes(
    make_setting: MakeSetting, examples: int
) -> None:
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(
        seed=st.integers(0, 2**32),
        size=st.integers(3, 5),
        rate=st.sampled_from([0.02, 0.1, 0.3]),
        crashes=st.sampled_from([0.0, 0.02]),
    )
    def holds(seed: int, size: int, rate: float, crashes: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            setting = make_setting(size, folder=Path(folder), aggregation=THREE)
            run_until_finished(setting, seed, rate, crashes)
            job = verify_transcript(setting.journal.transcript("job"), setting.roster)
            assert [release.round for release in job.releases] == [0, 1, 2, 3]
            check_releases(setting, job)
            event(f"{min(job.aborted_attempts, 3)} attempts aborted")
            setting.journal.close()

    holds()


def garble(reply: Any) -> Any:
    """Shares that no peer can open: what a lying owner sends at no cost."""
    if isinstance(reply, TogetherReply):
        return msgspec.structs.replace(reply, ahead=garble(reply.ahead))
    if not isinstance(reply, ShareReply | FillReply):
        return reply
    shares = tuple(
        EncryptedShare(sender=s.sender, recipient=s.recipient, ciphertext=os.urandom(92))
        for s in reply.shares
    )
    return msgspec.structs.replace(reply, shares=shares)


def lie_about_shares(reply: Any) -> Any:
    """Wrong shares of everybody's secrets."""
    if not isinstance(reply, UnmaskReply):
        return reply
    shares = tuple(type(s)(owner=s.owner, kind=s.kind, share=bytes(32)) for s in reply.shares)
    return UnmaskReply(context=reply.context, shares=shares)


def make_liar(setting: Any, site: str, lie: Callable[[Any], Any]) -> None:
    honest = setting.sites[site].answer
    setting.sites[site].answer = lambda request: lie(honest(request))


def test_a_site_that_reveals_wrong_shares_costs_no_attempt(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    make_liar(setting, "site-00", lie_about_shares)
    setting.job().run()
    assert setting.observer.aborts == []
    check_releases(setting, verify_transcript(setting.journal.transcript("job"), setting.roster))


def test_a_site_whose_secret_is_lost_is_left_out_of_the_rounds_next_attempt(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    liar = setting.sites["site-01"]
    make_liar(setting, "site-01", lambda reply: with_another_commitment(liar, reply))
    setting.job().run()
    # Once in each round: a later round asks it again, since several others could have framed it.
    assert setting.observer.aborts == [(number, 1, "seed-commitment") for number in (1, 2, 3)]
    others = ("site-00", "site-02", "site-03")
    assert [release.survivors for release in setting.observer.releases] == [others] * 3
    assert refusals_in(setting) == [(("site-01", "seed-commitment"),)] * 3


def test_a_site_is_not_left_out_where_one_liar_could_have_framed_it(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    make_liar(setting, "site-00", lie_about_shares)
    with pytest.raises(JobFailed, match=r"seed-commitment: .*: site-00, site-01, site-02"):
        setting.job(attempts=2).run()
    assert setting.observer.aborts == [(1, 1, "seed-commitment"), (1, 2, "seed-commitment")]
    assert refusals_in(setting) == [(), ()]


def test_shares_that_nobody_can_open_abort_the_attempt_and_nothing_waits(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    make_liar(setting, "site-02", garble)
    with pytest.raises(JobFailed, match="too-few-vectors"):
        setting.job(attempts=2).run()
    assert setting.observer.aborts == [(1, 1, "too-few-vectors"), (1, 2, "too-few-vectors")]
    victims = ("site-00", "site-01", "site-03")
    assert refusals_in(setting) == [tuple((site, "share-decrypt") for site in victims)] * 2


def with_another_commitment(site: Any, reply: Any) -> Any:
    """The advert of a site that shares one seed and commits to another."""
    if not isinstance(reply, TrainReply):
        return reply
    advert = decode(reply.advert.statement, KeyAdvert)
    signed = sign(site.identity, msgspec.structs.replace(advert, seed_commitment=os.urandom(32)))
    if isinstance(site.state, Prepared):
        plain = msgspec.structs.replace(site.state.advertised, advert=signed)
        site.state = msgspec.structs.replace(site.state, advertised=plain)
    else:
        site.state = msgspec.structs.replace(site.state, advert=signed)
    return TrainReply(advert=signed)


def refusals_in(setting: Any) -> list[Any]:
    """What the transcript says of each aborted attempt."""
    entries = [
        open_signed(signed, Entry, setting.roster.operator).event
        for signed in setting.journal.transcript("job")
    ]
    return [entry.refusals for entry in entries if isinstance(entry, AttemptAborted)]


def test_a_message_in_another_sites_name_takes_no_site_into_the_sum(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    forger = setting.sites["site-02"]
    honest = setting.sites["site-01"]

    def forged(sealed: bytes) -> bytes:
        reply = honest.handle(sealed)
        if not isinstance(honest.requests[-1], MaskRequest | MaskPreparedRequest):
            return reply
        key = setting.roster.member("site-01").public_key
        asked = request_digest(sealed)
        answer = open_reply(key, "site-01", reply, asked, limit=len(reply))
        return seal_reply(forger.identity, "site-01", answer, asked)

    setting.link.sites["site-01"] = forged
    setting.job().run()
    for release in setting.observer.releases:
        assert release.survivors == ("site-00", "site-02", "site-03")
    check_releases(setting, verify_transcript(setting.journal.transcript("job"), setting.roster))


@pytest.mark.parametrize("step", ["record_attempt", "record_release", "finish_job"])
@pytest.mark.parametrize("done", [False, True], ids=["before it", "after it"])
def test_a_crash_at_a_step_of_the_journal_is_made_good_by_the_next_start(
    make_setting: MakeSetting, step: str, done: bool
) -> None:
    setting = make_setting(3, aggregation=THREE)
    kept = getattr(setting.journal, step)

    def crash(*arguments: object, **named: object) -> None:
        if done:
            kept(*arguments, **named)
        raise Crash

    setattr(setting.journal, step, crash)
    with pytest.raises(Crash):
        setting.job().run()
    delattr(setting.journal, step)
    release = setting.job().run()
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.releases[-1] == release
    assert [r.round for r in job.releases] == [0, 1, 2, 3]
    assert job.delivered == tuple(sorted(setting.sites))
    check_releases(setting, job)
