"""How good the pictures are at which cost: evaluation, tuning, planning, calibration, comparison."""
