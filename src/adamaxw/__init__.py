"""AdamaxW for JAX: Adamax with decoupled weight decay, as an Optax gradient transformation."""

from adamaxw import masks as masks
from adamaxw import moments as moments
from adamaxw import sharding as sharding
from adamaxw._diagnostics import diagnostics as diagnostics
from adamaxw._optimizer import adamax as adamax
from adamaxw._optimizer import adamaxw as adamaxw
from adamaxw._state import AdamaxState as AdamaxState

__all__ = ["AdamaxState", "adamax", "adamaxw", "diagnostics", "masks", "moments", "sharding"]
