"""Operations on finished adapters and checkpoints, each of which gives an adapter: `combine` and `extract`."""
