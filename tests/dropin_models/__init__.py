"""Models as users write them: upstream's attribute names and calls, written from the published descriptions.

Nothing of trmfast is used here.
"""

from dropin_models.head import ACTLossHead
from dropin_models.nano import NanoTRM
from dropin_models.recursive import HRM, TRM, Baseline, Hier6, SingleZ
from dropin_models.urm import URM

__all__ = ["HRM", "TRM", "URM", "ACTLossHead", "Baseline", "Hier6", "NanoTRM", "SingleZ"]
