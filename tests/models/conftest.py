"""What tests of several models share."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope='session')
def released_weights():
    """Draw the weights that the stored outputs were computed from; RoPE buffers have no part in the recipe."""

    def draw(shapes):
        rng = np.random.default_rng(2024)
        weights = {}
        for key in sorted(shapes):
            shape = tuple(shapes[key])
            if key.endswith('num_batches_tracked'):
                weights[key] = torch.zeros(shape, dtype=torch.int64)
                continue
            values = rng.standard_normal(shape).astype(np.float32)
            if key.endswith('running_var'):
                values = 1 + np.float32(0.1) * np.abs(values)
            elif key.endswith(('running_mean', 'bias')):
                values = np.float32(0.1) * values
            elif values.ndim == 1:
                values = 1 + np.float32(0.1) * values
            else:
                values = values / np.sqrt(np.prod(shape[1:])).astype(np.float32)
            weights[key] = torch.from_numpy(values)
        return weights

    return draw
