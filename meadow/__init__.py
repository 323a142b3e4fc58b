"""meadow: federated and decentralized fine-tuning of language models.

Nothing phones home: the telemetry and update checks of every dependency are switched off before
any of them is imported.  A user who wants one sets its variable beforehand.
"""

import os

__version__ = "0.1.0"

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "ANONYMIZED_TELEMETRY": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
