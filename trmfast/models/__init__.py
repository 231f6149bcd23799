"""The published models with a fused recursion: constructors, state_dicts, carries and outputs as upstream's classes."""

from trmfast.config import HRMConfig, ModelConfig, TRMConfig, URMConfig
from trmfast.models.act import ACTModel
from trmfast.models.carry import Carry, Hier6InnerCarry, InnerCarry, SingleZInnerCarry
from trmfast.models.hrm import HRM
from trmfast.models.hrm_text import HRMText, HRMTextConfig
from trmfast.models.losses import IGNORE_LABEL_ID, ACTLossHead, softmax_cross_entropy, stablemax_cross_entropy
from trmfast.models.sparse_embedding import CastedSparseEmbedding, CastedSparseEmbeddingSignSGD_Distributed
from trmfast.models.trm import TRM, TRMHier6, TRMSingleZ
from trmfast.models.urm import URM, URMCarry

__all__ = [
    "HRM",
    "IGNORE_LABEL_ID",
    "TRM",
    "URM",
    "ACTLossHead",
    "ACTModel",
    "Carry",
    "CastedSparseEmbedding",
    "CastedSparseEmbeddingSignSGD_Distributed",
    "HRMConfig",
    "HRMText",
    "HRMTextConfig",
    "Hier6InnerCarry",
    "InnerCarry",
    "ModelConfig",
    "SingleZInnerCarry",
    "TRMConfig",
    "TRMHier6",
    "TRMSingleZ",
    "URMCarry",
    "URMConfig",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
]
