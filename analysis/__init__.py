"""Questions asked of a walk, of parameters, of a training run; claims; reports."""
