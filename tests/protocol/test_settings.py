"""Settings: flags, then TSQP_* variables, then the file of --config, then defaults."""

from pathlib import Path

import pytest
from protocol_helpers import Commands, Main, write_ids

GENERATE = ["generate", "random:tiny", "--privacy", "tee"]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text("max-tokens = 3\n")
    return path


def test_flags_come_before_variables_before_the_file_before_defaults(
    main: Main, settings: Path, ids: Path
) -> None:
    command = [*GENERATE, "--prompt-ids", ids, "--ignore-eos", "--json"]
    variable = {"TSQP_GENERATE_MAX_TOKENS": "2"}
    for tokens, result in (
        (1, main("--config", settings, *command, "--max-tokens", 1, env=variable)),
        (2, main("--config", settings, *command, env=variable)),
        (3, main("--config", settings, *command)),
        (128, main(*command)),
    ):
        assert [len(ids) for ids in result.token_ids] == [tokens]


def test_a_command_reads_its_file_and_its_variables_from_a_real_environment(
    commands: Commands, tmp_path: Path, ids: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'privacy = "tee"\nmax-tokens = 3\nprompt-ids = "{ids}"\n')
    environment = {"TSQP_CONFIG": str(path), "TSQP_MODEL": "random:tiny"}
    result = commands.run("generate", "--json", env=environment)
    assert [len(ids) for ids in result.token_ids] == [3]


def test_every_option_has_a_variable_of_its_command(main: Main, ids: Path) -> None:
    environment = {"TSQP_GENERATE_MAX_TOKENS": "3", "TSQP_GENERATE_JSON_OUTPUT": "1"}
    command = [*GENERATE, "--prompt-ids", ids, "--ignore-eos"]
    assert [len(ids) for ids in main(*command, env=environment).token_ids] == [3]
    flag = main(*command, "--max-tokens", 5, env=environment)
    assert [len(ids) for ids in flag.token_ids] == [5]


def test_a_table_speaks_to_one_command_and_comes_before_the_rest(
    main: Main, tmp_path: Path, ids: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        f"""
        privacy = "tee"
        max-tokens = 5
        listen = "a-key-of-worker-alone"
        [generate]
        model = "random:tiny"
        prompt-ids = "{ids}"
        max-tokens = 3
        ignore-eos = true
        """
    )
    result = main("--config", path, "generate", "--json")
    assert [len(ids) for ids in result.token_ids] == [3]


def test_every_kind_of_value_can_be_set_in_the_file(
    main: Main, tmp_path: Path, tiny_worker: str
) -> None:
    path = tmp_path / "settings.toml"
    ids = write_ids(tmp_path / "ids.json", [1], [2, 3])
    path.write_text(
        f"""
        privacy = "open"
        worker = "{tiny_worker}"
        no-shm = true
        json = true
        max-tokens = 3
        temperature = 0.5
        seed = 7
        prompt-ids = "{ids}"
        """
    )
    result = main("--config", path, "generate", "random:tiny")
    assert result.status == 0
    assert [len(ids) for ids in result.token_ids] == [3, 3]
    assert result.json["transport"] == "inline"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("privvacy = 'tee'", "'privvacy'"),
        ("[generate]\nlisten = 'x'", "'listen'"),
        ("[train]\ndtype = 'x'", "'train'"),
        ("[attention]\nx = 'x'", "'attention'"),
        ("generate = 3", "'generate'"),
        ("timeout = 'soon'", "timeout"),
        ("not toml", "settings.toml"),
    ],
)
def test_settings_that_nobody_knows_are_wrong_usage(
    text: str, named: str, main: Main, tmp_path: Path, ids: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    result = main("--config", path, *GENERATE, "--prompt-ids", ids)
    assert result.status == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_settings_file_that_is_not_there_is_wrong_usage(main: Main) -> None:
    result = main("--config", "/no/such/file", *GENERATE)
    assert result.status == 2
    assert "/no/such/file" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_variables_of_the_prototype_are_accepted(
    commands: Commands, main: Main, ids: Path
) -> None:
    variables = {
        "LLAMA_MODEL_PATH": "random:tiny",
        "LLAMA_DTYPE": "bfloat16",
        "LLAMA_GPU_DEVICE": "cpu",
        "LLAMA_IPC_PATH": commands.ipc(),
    }
    worker = commands.start("worker", env=variables)
    worker.says(f"serving random:tiny on cpu at {commands.ipc()}: ")
    assert "open in bfloat16" in worker.stderr
    command = ["generate", "--privacy", "open", "--prompt-ids", ids, "--max-tokens", "2"]
    assert main(*command, env=variables).status == 0
    device = main("worker", env=variables | {"LLAMA_GPU_DEVICE": "tpu"})
    assert "no such device" in device.error


def test_a_variable_of_ours_comes_before_one_of_the_prototype(main: Main, ids: Path) -> None:
    command = [*GENERATE, "--prompt-ids", ids]
    for ours, theirs, status in (("float32", "theirs", 0), ("ours", "float32", 1)):
        variables = {"TSQP_DTYPE": ours, "LLAMA_DTYPE": theirs}
        assert main(*command, env=variables).status == status


def test_a_worker_from_a_variable_is_for_the_modes_that_take_one(main: Main, ids: Path) -> None:
    variable = {"TSQP_WORKER": "ipc:///nowhere.sock"}
    assert main(*GENERATE, "--prompt-ids", ids, env=variable).status == 0
    result = main(*GENERATE, "--prompt-ids", ids, "--worker", "ipc:///nowhere.sock")
    assert result.status == 2
    assert "has no --worker" in result.error


@pytest.mark.parametrize("timeout", ["nan", "inf"])
def test_a_timeout_that_never_ends_is_wrong_usage(main: Main, ids: Path, timeout: str) -> None:
    result = main(*GENERATE, "--prompt-ids", ids, "--timeout", timeout)
    assert result.status == 2
    assert "timeout" in result.stderr
