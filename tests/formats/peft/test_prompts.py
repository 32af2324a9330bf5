from tests.formats.golden import check
import pytest
@pytest.mark.parametrize("folder", ["prompt_tuning", "prompt_tuning_tied", "p_tuning", "p_tuning_lstm"])
def test_a(folder, tmp_path):
    check(f"adapters/{folder}", tmp_path)
def test_b(tmp_path):
    check("adapters/prefix_tuning", tmp_path, as_peft=True)
