"""Each site is shown what it advertised last, and nobody else's."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import pytest

from umbel_common.errors import JobFailed
from umbel_common.plans.plan import Aggregation
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.wire import TrainFromLastRequest, TrainRequest
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.trust.identity import open_signed
from umbel_server.storage.journal import Journal

THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
MakeSetting = Callable[..., Any]


def shown(setting: Any, site: str) -> list[int | None]:
    """The round of the advert in each request to train; it is this site's, and fits its header."""
    rounds: list[int | None] = []
    for request in setting.sites[site].requests:
        if isinstance(request, TrainRequest | TrainFromLastRequest):
            if request.last is None:
                rounds.append(None)
                continue
            key = setting.sites[site].identity.public_key
            advert = open_signed(request.last.advert, KeyAdvert, key)
            header = open_signed(request.last.header, HEADER_VERSIONS, setting.roster.operator)
            assert (advert.site, advert.context) == (site, header.context())
            rounds.append(header.round)
    return rounds


def test_a_site_is_shown_its_advert_of_the_attempt_before(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.job().run()
    for site in setting.sites:
        assert shown(setting, site) == [None, 1, 2]


def test_an_advert_of_an_attempt_that_failed_is_shown_too_also_after_a_restart(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.link.lost = lambda step, site: step.stage == "mask" and site == "site-02"
    with pytest.raises(JobFailed):
        setting.job(attempts=1).run()
    setting.link.lost = lambda step, site: False
    setting.journal.close()
    setting.journal = Journal(setting.folder / "journal.sqlite")
    setting.job().run()
    for site in setting.sites:
        assert shown(setting, site) == [None, 1, 1, 2]


def test_another_jobs_advert_is_shown_as_well(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.job().run()
    setting.plan = msgspec.structs.replace(setting.plan, job="second")
    for site in setting.sites.values():
        site.plan = setting.plan
        site.requests.clear()
    setting.job().run()
    assert shown(setting, "site-00") == [3, 1, 2]


def test_a_reply_that_breaks_a_rule_is_not_kept(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    liar = setting.sites["site-01"]
    honest = liar.answer

    def answer(request: Any) -> Any:
        reply = honest(request)
        if isinstance(request, TrainRequest | TrainFromLastRequest):
            other = setting.sites["site-02"].identity
            return msgspec.structs.replace(reply, advert=_signed_by(other, reply.advert))
        return reply

    liar.answer = answer
    setting.job().run()
    with closing(Journal(setting.folder / "journal.sqlite")) as journal:
        assert set(journal.last_adverts()) == {"site-00", "site-02", "site-03"}


def _signed_by(identity: Any, advert: Any) -> Any:
    return msgspec.structs.replace(advert, signature=identity.sign("KeyAdvert", advert.statement))
