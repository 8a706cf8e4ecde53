"""One job at one site: model, data, ledger, and the delta of each round.

The order is the law: reserve in the ledger, train, store the delta, record its digest in the
ledger, and only then may anything derived from it leave.
"""

from collections.abc import Callable
from pathlib import Path

from umbel_client.accounting import Event, calibrate, require_delta
from umbel_client.config import ClientConfig
from umbel_client.data import load_records
from umbel_client.delta_cache import DeltaCache, State
from umbel_client.ledger import Budget, Ledger
from umbel_client.model import AdaptedModel
from umbel_client.observer import Observer
from umbel_client.training import prepare, sampling_rate, train_round
from umbel_common.adapter import Vector
from umbel_common.canonical import Entropy
from umbel_common.errors import RemoteProtocolError
from umbel_common.plan import LocalPrivacy, TrainingPlan
from umbel_common.quantise import RingVector, encode, encoding_of
from umbel_common.statements import RoundHeader
