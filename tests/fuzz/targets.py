"""The list of all targets."""

from fuzz.coordinators import COORDINATORS
from fuzz.decoders import DECODERS
from fuzz.files import FILES
from fuzz.sites import SITES
from fuzz.target import Target
from fuzz.trainers import TRAINERS
from fuzz.transcripts import TRANSCRIPTS

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (*DECODERS, *FILES, *TRANSCRIPTS, *SITES, *COORDINATORS, *TRAINERS)
}
"""Targets by name."""
