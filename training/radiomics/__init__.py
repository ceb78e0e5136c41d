"""Radiomic features of a region, and whether two sets of images give the same ones.

The features are the four families of Wei & Hsu, "Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose
CT Scans", MIDL 2021: first order (18), GLCM (24), GLRLM (16) and GLSZM (16), 74 in all. Names are those of pyradiomics
(van Griethuysen et al., Cancer Res 2017;77:e104), as ``family_Feature``; definitions are those of the Image Biomarker
Standardisation Initiative, IBSI (Zwanenburg et al., Radiology 2020;295:328; reference manual arXiv 1612.07003).

Where the two differ, the value is pyradiomics':

- ``firstorder_Kurtosis`` is not the excess: it is 3 above IBSI's.
- ``firstorder_10Percentile``, ``90Percentile`` and ``InterquartileRange`` interpolate between voxels, which IBSI leaves
  open.
- ``firstorder_TotalEnergy`` and ``glcm_MCC`` have no counterpart in IBSI.
- ``firstorder_Entropy`` and ``Uniformity`` are IBSI's intensity histogram features: of grey levels, not of HU.
- Grey levels of a fixed bin width count from a multiple of the width, where IBSI counts from the minimum of the region;
  of a fixed number of bins they are the same.
- In a region of one grey level ``Skewness`` and ``Kurtosis`` are 0 and ``glcm_Correlation`` and ``glcm_MCC`` are 1.

IBSI's dissimilarity, sum variance and joint average are in the 74 under one name each: ``DifferenceAverage``,
``ClusterTendency`` and ``JointAverage``.
"""

from training.radiomics.comparison import FeatureComparison, compare, holm, lin_concordance
from training.radiomics.extraction import FEATURES, PRESET_57, features

__all__ = ["FEATURES", "PRESET_57", "FeatureComparison", "compare", "features", "holm", "lin_concordance"]
