"""The recipes as modules, for those who installed a wheel: `accelerate launch -m tokcom_hf.recipes.train_tokcom`."""

import sys
from pathlib import Path

# Recipes import one another by bare name, which Python resolves for a script by itself.
sys.path.append(str(Path(__file__).parent))
