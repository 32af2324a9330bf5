"""(IA)^3, selective tuning and the zoo in PEFT's files."""
from __future__ import annotations

import pytest

from tests.formats.golden import check

FOLDERS = [*(f"adapters/{name}" for name in ("ia3", "ia3_relu", "ln_tuning")),
           *(f"zoo/{name}_t5" for name in ("hira", "loha", "lokr", "lokr_both", "oft", "shira", "vera"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back(folder, tmp_path):
    check(folder, tmp_path)
