"""All that this package puts into registries for training and testing; importing it is what registers them."""

import mila_mm.engine.config.extras
import mila_mm.engine.hooks.checkpoint
import mila_mm.engine.hooks.curves
import mila_mm.engine.hooks.divergence
import mila_mm.engine.hooks.draw_predictions
import mila_mm.engine.hooks.identity
import mila_mm.engine.hooks.mesa
import mila_mm.engine.hooks.nonfinite
import mila_mm.engine.hooks.resume_state
import mila_mm.engine.hooks.stop
import mila_mm.engine.optimizers.amp
import mila_mm.engine.optimizers.layer_decay
import mila_mm.engine.runner.loops
import mila_mm.engine.runner.sampler
import mila_mm.engine.runner.sharded_model
import mila_mm.engine.screen
import mila_mm.engine.testing
import mila_mm.engine.training  # noqa: F401  the last of imports that only register
