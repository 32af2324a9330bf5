"""LoRA in PEFT's files."""
import pytest

from tests.formats.golden import check

FOLDERS = ("lora_qv", "lora_qv_tied", "lora_all_linear", "lora_rslora", "lora_rank_alpha_pattern")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back(folder, tmp_path):
    check(f"adapters/{folder}", tmp_path)


def test_lora_on_the_shared_table_acts_wherever_the_table_is_used(tmp_path):
    """In PEFT it acts once it is merged, and not before."""
    with pytest.warns(UserWarning, match="PEFT's own forward ignores what is stored for 'shared'"):
        check("adapters/lora_embedding", tmp_path, "logits_peft_merged")
