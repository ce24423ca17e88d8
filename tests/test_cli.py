"""The command line: exit codes, messages on stderr, and what is printed on stdout."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import trapezoid

import lorastate as ls
from lorastate import figures
from lorastate._version import __version__
from lorastate.bayes import posterior
from lorastate.cli import checks, environment, screen, tables
from lorastate.cli import main as cli
from lorastate.cli import predict as predict_command
from lorastate.design import optimize as design
from lorastate.errors import Code, SolveError
from lorastate.figures import drawing, maps
from lorastate.runtime.program import Program
from lorastate.runtime.progress import listening, tell
from lorastate.setting.fields import continuous_fields
from lorastate.setting.files import load_setting, setting_from_dict, setting_to_dict
from lorastate.setting.paths import get, replace
from lorastate.simulation import simulate as simulation
from lorastate.simulation import two_stages
from lorastate.solution import gradients, solution

jax.config.update("jax_enable_x64", True)

TEXT = """
[pretraining]
activation = "identity"
alpha = 0.1
lam = 0.1
[finetuning]
alpha = 3.0
lam = 0.05
[numerics]
nodes = 1024
finetuning_nodes = 2048
replicas = 4
"""
PRETRAINING = {"V", "M", "M_down", "Q", "qhat", "mhat", "shat", "overlap", "train_loss", "test_error", "rank_fraction",
               "replicon", "double_well_share"}  # fmt: skip
FINETUNING = {"v", "m", "q", "overlap", "train_loss", "test_error", "test_error_frozen", "effective_noise",
              "best_adapter_factor", "test_error_best_factor", "forgetting_error", "forgetting_error_frozen",
              "recalibration", "free_energy", "replicon", "double_well_share", "p", "breaking",
              "complexity"}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "setting.toml"
    file.write_text(TEXT)
    return str(file)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self):
        def refuse(text):
            raise AssertionError(f"{text} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def message(self):
        """The only line of stderr, which must be one sentence of ours."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("lorastate: ") and "Traceback" not in self.err, self.err
        return lines[0]


LIMITS = predict_command.limits_of


@pytest.fixture
def few_labels(monkeypatch):
    """Bayes-optimal limits of fine-tuning on fewer nodes: two seconds each otherwise."""
    monkeypatch.setattr(posterior, "_OUTER", 2**11)


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.delenv("JAX_ENABLE_X64", raising=False)
    monkeypatch.setattr(predict_command, "limits_of", lambda setting: None)  # seconds each; one test has them
    monkeypatch.setattr(two_stages, "TEST_SAMPLES", 1000)  # 20 000 take a second

    def run(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)

    return run


# Bad input.


@pytest.mark.parametrize("command", ["predict", "optimize", "gradient", "simulate"])
@pytest.mark.parametrize(
    "override, words",
    [
        ("pretraining.lamda=1", ["unknown key pretraining.lamda", "did you mean lam?"]),
        ("pretraining.alpha=one", ["pretraining.alpha = 'one'", "not a number"]),
        ("pretraining.alpha=true", ["pretraining.alpha = True", "not a number"]),
        ("pretraining.alpha=nan", ["pretraining.alpha = nan", "alpha > 0"]),
        ("finetuning.alpha=inf", ["finetuning.alpha = inf", "finite"]),
        ("finetuning.alpha=0", ["finetuning.alpha = 0.0", "alpha > 0"]),
        ("pretraining.delta=-1", ["pretraining.delta = -1.0", "delta >= 0"]),
        ("pretraining.lam=0", ["pretraining.lam = 0.0", "zero is not allowed because"]),
        ("finetuning.lam=-1", ["finetuning.lam = -1.0", "zero is not allowed because"]),
        ("pretraining.kappa0=0", ["pretraining.kappa0 = 0.0", "kappa0 > 0"]),
        ("pretraining.tokens=1", ["pretraining.tokens = 1", "2 to"]),
        ("numerics.nodes=-8", ["numerics.nodes = -8"]),
        ("pretraining.lam", ["no '='", "section.key=value"]),
        ("pretraining.lam=", ["no readable value"]),
    ],
)
def test_bad_settings(call, path, command, override, words):
    outcome = call(command, path, "--set", override)
    assert outcome.code == 2 and outcome.out == ""
    assert all(word in outcome.message for word in words), outcome.message


def test_what_is_replaced_in_a_setting_is_said(call, path, monkeypatch):
    import warnings

    words = ("finetuning.inputs=selected", "finetuning.rho=0.02", "finetuning.pool=100")

    def stop(setting, **_):
        raise SolveError("finetuning", Code.cycle)

    monkeypatch.setattr(design, "optimize", stop)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        outcome = call("optimize", path, "--set", *words)
    first, last = outcome.err.splitlines()
    assert first == ("lorastate: finetuning.alpha = 3 is replaced by rho * pool = 2, which it is on selected inputs")
    assert outcome.code == 3 and "cycle" in last


def test_bad_files(call, tmp_path):
    missing = call("predict", tmp_path / "nowhere.toml")
    assert missing.code == 2 and "no settings file" in missing.message
    directory = call("gradient", tmp_path)
    assert directory.code == 2 and "is a directory" in directory.message
    file = tmp_path / "words.toml"
    file.write_text("[pretraining]\nsome words\n")
    not_toml = call("simulate", file)
    assert not_toml.code == 2 and "line 2" in not_toml.message


@pytest.mark.parametrize("value", ["0", "False", "off", "perhaps", ""])
def test_float64_off(call, path, monkeypatch, value):
    monkeypatch.setenv("JAX_ENABLE_X64", value)
    outcome = call("predict", path)
    assert outcome.code == 2 and "float64 is switched off" in outcome.message and outcome.out == ""


def test_float64_off_in_a_fresh_process(path):
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    words = [sys.executable, "-m", "lorastate.cli.main", "predict", path]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lorastate: float64 is switched off") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--over", "pretraining.lan"], "did you mean pretraining.lam?"),
        (["--over", "pretraining.beta"], "is not a continuous field"),
        (["--over", "numerics.nodes"], "is not a continuous field"),
        (["--over", ","], "names no field"),
        (["--over", "finetuning.lam,finetuning.lam"], "more than once"),
        (["--minimize", "loss"], "allowed: test_error, effective_noise, overlap"),
        (["--verify", "--dimension", "5"], "--dimension 5 is out of range"),
        (["--verify", "--runs", "0"], "--runs 0 is out of range"),
        (["--verify", "--seed", "-1"], "--seed -1 is out of range"),
        (["--verify", "--dimension", "10000"], "GiB of memory"),
    ],
)
def test_bad_options_of_optimize(call, path, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(design, "optimize", None)  # any computation would be a TypeError
    outcome = call("optimize", path, "--out", tmp_path / "out", *words)
    assert outcome.code == 2 and message in outcome.message


def test_bad_out(call, path, tmp_path, monkeypatch):
    monkeypatch.setattr(design, "optimize", None)
    monkeypatch.setattr(figures, "figure1", None)
    for out in (path, f"{path}/below", tmp_path / ("x" * 300)):
        for command in (["optimize", path], ["figure", "1"]):
            outcome = call(*command, "--out", out)
            assert outcome.code == 2 and f"--out '{out}'" in outcome.message and "directory" in outcome.message


@pytest.mark.skipif(os.name != "posix", reason="permissions are different there")
def test_unwritable_out(call, path, tmp_path, monkeypatch):
    monkeypatch.setattr(design, "optimize", None)
    (tmp_path / "out").mkdir()

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)  # root may write anywhere: chmod proves nothing
    outcome = call("optimize", path, "--out", tmp_path / "out")
    assert outcome.code == 2 and "cannot be written to (Permission denied)" in outcome.message


def test_bad_objective_of_gradient(call, path):
    outcome = call("gradient", path, "--of", "loss")
    assert outcome.code == 2 and "--of 'loss' is unknown" in outcome.message


def test_bad_simulation(call, path):
    assert "--dimension 5 is out of range" in call("simulate", path, "--dimension", "5").message
    outcome = call("simulate", path, "--dimension", "10", "--set", "pretraining.kappa=0.01")
    assert outcome.code == 2 and "pretraining.kappa" in outcome.message


def test_other_figures(call):
    outcome = call("figure", "7")
    assert outcome.code == 2 and "figure 7 is not available" in outcome.message


@pytest.mark.parametrize("words", [[], ["predict"], ["predict", "a", "b"], ["forecast", "a"], ["figure", "one"]])
def test_usage_errors(call, words):
    outcome = call(*words)
    assert outcome.code == 2 and outcome.out == "" and "Traceback" not in outcome.err


def test_a_null_byte_is_no_argument(capsys):
    for words in (["predict", "a\0b"], ["optimize", "x.toml", "--out", "\0"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err == "lorastate: an argument holds a null byte; allowed: text\n"


def test_help_and_version_do_not_need_jax():
    code = (
        "import sys\nsys.modules['jax'] = None\nfrom lorastate.cli import main as cli\n"
        "assert cli.main(['--version']) == 0\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as leaving:\n    sys.exit(leaving.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(__version__)
    assert all(name in done.stdout for name in ("predict", "optimize", "gradient", "simulate", "figure"))


# What the environment may be like.


def start(words, **environment):
    environment, pipe = os.environ | environment, subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=environment, text=True, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_no_device(path, platforms):
    process = start(["-m", "lorastate", "predict", path], JAX_PLATFORMS=platforms)
    out, said = process.communicate()
    assert process.returncode == 2 and out == ""
    assert said.startswith(f"lorastate: JAX finds nothing to compute on with JAX_PLATFORMS='{platforms}'"), said
    assert "allowed" in said and said.count("\n") == 1


def test_debug_nans(path):
    code = (
        "from lorastate.bayes import posterior; posterior._OUTER = 2**11; from lorastate.__main__ import main; main()"
    )
    process = start(["-c", code, "predict", path, "--json"], JAX_DEBUG_NANS="1", JAX_DEBUG_INFS="1")
    out, said = process.communicate()
    assert process.returncode == 0 and said == ""
    assert json.loads(out)["finetuning"]["test_error"] == pytest.approx(0.988, rel=0.05)


def test_rules_for_other_programs(path):
    """What the environment may ask of JAX for programs of one's own."""
    rules = {"DISABLE_JIT": "1", "NO_TRACING": "1", "NUMPY_DTYPE_PROMOTION": "strict", "NUMPY_RANK_PROMOTION": "raise",
             "TRANSFER_GUARD": "disallow", "DEFAULT_PRNG_IMPL": "rbg"}  # fmt: skip
    words = ["-m", "lorastate", "simulate", path, "--dimension", "20", "--runs", "1", "--starts", "1", "--json"]
    (out, said), (plain, _) = (
        start(words, **{f"JAX_{name}": value for name, value in given.items()}).communicate() for given in (rules, {})
    )
    assert out == plain and json.loads(out)["runs"] == 1 and "Traceback" not in said, said


def test_a_value_that_jax_does_not_know(path):
    process = start(["-m", "lorastate", "predict", path], JAX_LOGGING_LEVEL="LOUD")
    out, said = process.communicate()
    assert process.returncode == 2 and out == "" and said.count("\n") == 1
    assert said.startswith("lorastate: JAX does not start") and "LOUD" in said and "allowed" in said


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_stdout_has_not(tmp_path, encoding):
    code = "from lorastate.cli import main as cli; cli._run = lambda c: cli.say(str(c.out)) or 0; cli.main()"
    words = ["-c", code, "figure", "1", "--out", "r\u00e9sultats"]
    process = start(words, PYTHONIOENCODING=encoding)
    out, said = process.communicate()
    assert process.returncode == 0 and said == ""
    assert out.strip() == ("r\u00e9sultats" if encoding == "utf-8" else "r\\xe9sultats")


def test_figures_need_no_tex(tmp_path, monkeypatch):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        environment.drawing()
        figure, axes = drawing.side_by_side(1, 3, 2)
        axes.set(xlabel="finetuning.test_error 100 %")
        assert all(path.exists() for path in drawing.save_pictures(figure, tmp_path, "picture"))


# Stands in for a compiler: it does not let Python see a signal.
COMPILES = """
    import hashlib, threading
    def compiles():
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)
"""
INTERRUPTED = {
    "the compiler is at work": COMPILES + "    cli._run = lambda command: compiles()",
    "a thread is": COMPILES
    + """
    def run(command):
        threading.Thread(target=compiles).start()
        threading.Event().wait()
    cli._run = run
    """,
    "garbage is collected": """
    import gc, time
    def collecting(*_):
        gc.callbacks.clear()
        print("ready", flush=True)
        time.sleep(60)
    def run(command):
        gc.callbacks.append(collecting)
        gc.collect()
        time.sleep(60)
    cli._run = run
    """,
    "something is imported that makes an error of its own of it": """
    import time
    def importing(command):
        print("ready", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("an extension could not be initialised")
    cli._run = importing
    """,
    "somebody takes it for something else and goes on": """
    import time
    def careless(command):
        print("ready", flush=True)
        try:
            time.sleep(60)
        except BaseException:
            time.sleep(60)
    cli._run = careless
    """,
}


@pytest.mark.skipif(os.name != "posix", reason="signals are different there")
@pytest.mark.parametrize("when", INTERRUPTED)
def test_ctrl_c_while(when):
    # A process started in the background may have inherited that SIGINT is ignored.
    heard = "    import signal\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    patience = "    from lorastate.cli import main as cli\n    cli._PATIENCE, cli._LONGEST = 0.5, 1.0\n"
    code = textwrap.dedent(heard + patience + INTERRUPTED[when])
    process = start(["-c", code + "\ncli.main()", "figure", "1"])
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.endswith("lorastate: interrupted\n") and "Traceback" not in said, said


@pytest.mark.skipif(os.name != "posix", reason="signals are different there")
def test_ctrl_c_before_the_command_line_is_there():
    code = """
        import signal, sys, threading
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Slow:
            def find_spec(self, name, *_):
                if name == "lorastate.cli":
                    print("ready", flush=True)
                    threading.Event().wait()
        sys.meta_path.insert(0, Slow())
        from lorastate.__main__ import main
        main()
    """
    process = start(["-c", textwrap.dedent(code)])
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "lorastate: interrupted\n")


# Where what is compiled is kept.


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    return environment.cache


def test_cache_of_the_user(cache, tmp_path, capsys):
    for variable, value, folder in (("HOME", "home", "home/.cache"), ("XDG_CACHE_HOME", "xdg", "xdg")):
        os.environ[variable] = str(tmp_path / value)
        assert cache() == str(tmp_path / folder / "lorastate") and os.stat(cache()).st_mode & 0o777 == 0o700
    os.environ["XDG_CACHE_HOME"] = "relative"  # which the specification says to ignore
    assert cache() == str(tmp_path / "home/.cache/lorastate") and not (tmp_path / "relative").exists()
    assert capsys.readouterr().err == ""
    os.chmod(cache(), 0o777)
    assert cache() is None and "others may write to" in capsys.readouterr().err


def test_no_place_for_a_cache(cache, tmp_path, capsys, monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    with monkeypatch.context() as patched:
        patched.setattr(pwd, "getpwuid", unknown)
        assert cache() is None and "there is no home directory" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", "/proc/nowhere"):
        os.environ["HOME"] = str(home)
        assert cache() is None
        said = capsys.readouterr().err
        assert said.startswith("lorastate: nothing is kept") and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_others_are_writing_is_not_worth_a_word(call, path, monkeypatch):
    import warnings

    def predict(*_, **__):
        warnings.warn("Error reading persistent compilation cache entry for 'jit_solve': it is not whole", stacklevel=1)
        raise SolveError("finetuning", Code.cycle)

    monkeypatch.setattr(solution, "predict", predict)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert "cycle" in call("predict", path).message


# A solve that fails.


@pytest.mark.parametrize("command", ["predict", "optimize", "gradient"])
def test_too_narrow(call, path, tmp_path, command):
    extra = ["--out", tmp_path / "out"] if command == "optimize" else []
    outcome = call(command, path, "--set", "pretraining.kappa=0.05", *extra)
    assert outcome.code == 3 and "value" not in outcome.out  # no table of a stage that failed
    assert "pretraining" in outcome.err and "too_narrow" in outcome.err and "Traceback" not in outcome.err


def test_json_of_a_failed_prediction(call, path):
    outcome = call("predict", path, "--json", "--set", "pretraining.kappa=0.05")
    assert outcome.code == 3 and "too_narrow" in outcome.message
    assert outcome.json["setting"]["pretraining"]["kappa"] == 0.05


# Predictions.


def test_predict_json(call, path, monkeypatch, few_labels):
    monkeypatch.setattr(predict_command, "limits_of", LIMITS)
    outcome = call("predict", path, "--json")
    assert outcome.code == 0 and outcome.err == ""
    data = outcome.json
    assert set(data) == {
        "pretraining", "finetuning", "bayes_optimal", "quadrature_error", "status", "setting", "version", "symmetry",
        "pretraining_symmetry", "rs",
    }  # fmt: skip
    assert data["symmetry"] == "replica symmetric" and data["rs"] is None
    assert data["pretraining_symmetry"] == "replica symmetric"
    limits = data["bayes_optimal"]
    assert set(limits["pretraining"]) == {"Q", "overlap", "test_error"}
    assert set(limits["finetuning"]) == {"q", "overlap", "test_error", "effective_noise"}
    assert limits["pretraining"]["Q"] == pytest.approx(1.7449, abs=1e-4)
    assert limits["finetuning"]["test_error"] < data["finetuning"]["test_error"]
    assert set(data["pretraining"]) == PRETRAINING and set(data["finetuning"]) == FINETUNING
    errors = data["quadrature_error"]
    assert set(errors["pretraining"]) <= PRETRAINING and set(errors["finetuning"]) <= FINETUNING
    for stage in ("pretraining", "finetuning"):
        assert set(data["status"][stage]) == {"code", "residual", "steps"}
        assert all(x is None or isinstance(x, float) for part in (data, errors) for x in part[stage].values())
    assert errors["finetuning"]["test_error"] > 0
    # Identity pre-training is in closed form; fine-tuning to what these few nodes give.
    assert data["pretraining"]["M"] == pytest.approx(1.41106875, abs=1e-7)
    assert data["finetuning"]["test_error"] == pytest.approx(0.988, rel=0.05)
    assert data["version"] == __version__
    assert data["setting"] == setting_to_dict(load_setting(path)) == setting_to_dict(setting_from_dict(data["setting"]))


def test_predict_table(call, path):
    outcome = call("predict", path, "--set", "pretraining.lam=0.5", "finetuning.lam=1", "--set", "finetuning.alpha=2")
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert "lam 0.5" in lines[0] and "alpha 2" in lines[1] and "lam 1" in lines[1]
    rows = {line.split()[0]: line.split() for line in lines if line[:1].isalpha()}
    assert float(rows["M"][1]) == pytest.approx(0.520586, abs=1e-6)
    for name in FINETUNING - {"double_well_share", "breaking", "complexity"}:
        assert np.isfinite(float(rows[name][1]))
    assert float(rows["test_error"][2]) > 0
    assert "Pre-training ok" in outcome.out and "Fine-tuning ok" in outcome.out
    assert lines[-1].startswith("Branches: ")


def test_the_phase_is_said():
    stages: dict = {"pretraining": {"replicon": 1.2, "double_well_share": 5e-4}, "finetuning": {"replicon": 0.4}}
    lines = tables.symmetry_lines({**stages, "symmetry": "replica symmetric", "rs": None}).splitlines()
    assert len(lines) == 2 and "replicon 1.2" in lines[0] and lines[1] == "Fine-tuning is replica symmetric."
    stages["finetuning"] = {"replicon": None, "p": 0.8, "q": 1.0}
    rs = {"test_error": 0.88, "overlap": 0.07, "free_energy": None, "code": "ok"}
    broken = {**stages, "symmetry": "one-step broken", "rs": rs}
    text = tables.symmetry_lines(broken)
    assert "glass" in text and "test_error 0.88, overlap 0.07, free_energy -" in text and "deep" not in text
    stages["finetuning"]["p"] = 0.3
    change = {"test_error": 0.0056, "overlap": -0.015, "free_energy": 0.0}
    text = tables.symmetry_lines({**broken, "breaking_error": change})
    assert "The glass is deep (p/q = 0.3)" in text and "test_error by +0.0056, overlap by -0.015" in text
    assert "found no solution" in tables.symmetry_lines({**broken, "breaking_error": None})
    stages["pretraining"]["double_well_share"] = 0.03
    assert "Pre-training has many minima (3 % of its nodes" in tables.symmetry_lines(broken)


def test_undefined_numbers_are_null(call, path, monkeypatch):
    real = solution.predict(load_setting(path))
    summary = real.summary()
    summary["finetuning"]["overlap"] = float("nan")
    summary["quadrature_error"]["finetuning"]["overlap"] = float("inf")
    fake = SimpleNamespace(ok=True, summary=lambda: summary, require_ok=lambda: None, branches=real.branches)
    monkeypatch.setattr(solution, "predict", lambda *_, **__: fake)
    data = call("predict", path, "--json").json
    assert data["finetuning"]["overlap"] is None and data["quadrature_error"]["finetuning"]["overlap"] is None
    assert not {"nan", "inf", "None"} & set(call("predict", path).out.split())


# Gradients.


def test_gradient(call, path):
    data = call("gradient", path, "--json").json
    setting = load_setting(path)
    assert list(data["gradient"]) == list(continuous_fields(setting))
    assert all(isinstance(slope, float) for slope in data["gradient"].values())
    value, slope = gradients.gradient(setting)
    assert data["value"] == pytest.approx(float(value), rel=1e-9)
    assert data["gradient"]["finetuning.lam"] == pytest.approx(float(slope["finetuning.lam"]), rel=1e-6)
    h = 1e-3 * float(get(setting, "finetuning.lam"))
    sides = [replace(setting, "finetuning.lam", get(setting, "finetuning.lam") + sign * h) for sign in (1, -1)]
    up, down = (solution.predict(side).summary()["finetuning"]["test_error"] for side in sides)
    assert data["gradient"]["finetuning.lam"] == pytest.approx((up - down) / (2 * h), rel=1e-3)


def test_gradient_table(call, path):
    outcome = call("gradient", path, "--of", "effective_noise")
    assert outcome.code == 0 and outcome.out.count("pretraining.") == 5 and "effective_noise =" in outcome.out


def test_gradient_without_a_value(call, path, monkeypatch):
    monkeypatch.setattr(gradients, "gradient", lambda *_, **__: (0.5, {"pretraining.lam": float("nan")}))
    outcome = call("gradient", path, "--json")
    assert outcome.code == 3 and outcome.json["gradient"] == {"pretraining.lam": None}
    assert "no finite derivative in pretraining.lam" in outcome.message


# Optimisation: the descent itself has tests of its own.


@pytest.fixture
def descent(path, monkeypatch):
    """Stands in for a descent that ends at lam = 0.2; returns it, to be changed by the test."""
    initial = load_setting(path)
    final = replace(initial, "pretraining.lam", 0.2)
    fake = SimpleNamespace(
        over=("pretraining.lam",), minimize="test_error", initial=initial, setting=final,
        before=solution.predict(initial), after=solution.predict(final),
        path=[{"pretraining.lam": 0.1, "value": 1.0, "gradient_norm": 0.3}],
        gradient_norm=1e-7, solves=12, converged=True, message="the gradient vanishes",
        budgets=[], scanned=[],
        summary=lambda: {"over": ["pretraining.lam"], "solves": 12, "gradient_norm": 1e-7},
    )  # fmt: skip
    fake.called = []

    def optimize(setting, **options):
        fake.called.append(options)
        return fake

    monkeypatch.setattr(design, "optimize", optimize)
    monkeypatch.setattr(figures, "optimization", lambda optimum, out, simulation=None: [out / "figure.png"])
    return fake


def test_optimize(call, path, tmp_path, descent):
    out = tmp_path / "deep" / "out"
    words = ["--over", "pretraining.lam, finetuning.delta", "--minimize", "effective_noise", "--out", out]
    outcome = call("optimize", path, *words)
    assert outcome.code == 0 and outcome.err == ""
    over = ("pretraining.lam", "finetuning.delta")
    assert descent.called == [{"over": over, "minimize": "effective_noise", "progress": True}]
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    assert rows["lambda"][1:] == ["0.1", "0.2"] and rows["lambda'"][1:] == ["0.05", "0.05"]
    for name in ("Delta_eff", "E", "E'", "o_w", "O_W"):
        before, error, after, _ = map(float, rows[name][1:])
        assert before != after and error >= 0
    assert "gradient norm" in outcome.out and "solves used" in outcome.out
    result = json.loads((out / "result.json").read_text())
    assert result["setting"]["pretraining"]["lam"] == 0.2 and result["initial_setting"]["pretraining"]["lam"] == 0.1
    assert result["version"] == __version__ and "verification" not in result
    assert str(out / "result.json") in outcome.out and str(out / "figure.png") in outcome.out


def test_optimize_without_convergence(call, path, tmp_path, descent):
    descent.converged, descent.message = False, "the steps ran out"
    outcome = call("optimize", path, "--out", tmp_path)
    assert outcome.code == 3 and "did not converge (the steps ran out)" in outcome.message
    assert (tmp_path / "result.json").exists()


def test_optimize_says_where_pretraining_has_many_minima(call, path, tmp_path, descent):
    descent.after = eqx.tree_at(lambda s: s.pretraining["double_well_share"], descent.after, 0.03)
    assert descent.after.pretraining_symmetry == "unstable"
    outcome = call("optimize", path, "--out", tmp_path)
    assert outcome.code == 0 and "Pre-training has many minima (3 % of its nodes" in outcome.out


def test_optimize_verified(call, path, tmp_path, descent, monkeypatch):
    small = ["--dimension", "20", "--runs", "2", "--seed", "1"]
    outcome = call("optimize", path, "--out", tmp_path, "--verify", *small)
    assert outcome.code == 0 and "Simulation at D = 20, 2 runs, seed 1" in outcome.out
    entry = json.loads((tmp_path / "result.json").read_text())["verification"]["finetuning"]["test_error"]
    bar = np.hypot(entry["stderr"], entry["quadrature_error"])
    assert entry["gap"] == pytest.approx((entry["mean"] - entry["theory"]) / bar)
    assert entry["theory"] == descent.after.summary()["finetuning"]["test_error"]


def test_interrupted(call, path, tmp_path, descent, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "simulate", interrupt)
    outcome = call("optimize", path, "--out", tmp_path, "--verify", "--dimension", "20")
    assert outcome.code == 130 and outcome.message == "lorastate: interrupted"
    assert (tmp_path / "result.json").exists()


def test_solve_error_inside(call, path, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SolveError("finetuning", Code.cycle)

    monkeypatch.setattr(design, "optimize", fail)
    outcome = call("optimize", path, "--out", tmp_path)
    assert outcome.code == 3 and "finetuning: cycle" in outcome.message


def test_broken_pipe(path):
    words = [sys.executable, "-m", "lorastate.cli.main", "--version"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk():
    words = [sys.executable, "-m", "lorastate.cli.main", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("lorastate: input or output failed")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="shells are different there")
@pytest.mark.parametrize(
    ("closed", "words", "code", "said"),
    [
        (">&-", "--version", 1, "lorastate: input or output failed (stdout is closed)\n"),
        (">&-", "--help", 1, "lorastate: input or output failed (stdout is closed)\n"),
        (">&- 2>&-", "--version", 1, ""),
        ("2>&-", "predict nowhere.toml", 2, ""),
        ("<&-", "--version", 0, ""),
    ],
)
def test_closed_streams(closed, words, code, said):
    command = f'exec "$0" -m lorastate {words} {closed}'
    done = subprocess.run(["/bin/sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout == (f"{__version__}\n" if code == 0 else "")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")],
)
def test_out_of_memory(call, path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(solution, "predict", fail)
    outcome = call("predict", path)
    assert outcome.code == 3 and "memory ran out" in outcome.message


# Simulation and figures.


def test_simulate_json(call, path):
    outcome = call("simulate", path, "--dimension", "20", "--runs", "2", "--seed", "3", "--json")
    assert outcome.code == 0
    data = outcome.json
    assert (data["dimension"], data["runs"], data["seed"], data["version"]) == (20, 2, 3, __version__)
    assert data["setting"] == setting_to_dict(load_setting(path))
    theory = solution.predict(load_setting(path)).summary()
    for stage, names in (("pretraining", {"M", "Q"}), ("finetuning", {"m", "q"})):
        assert names | {"overlap", "train_loss", "test_error"} <= set(data[stage])
        for name, entry in data[stage].items():
            assert np.isfinite([entry["mean"], entry["stderr"]]).all()
            assert entry["theory"] == theory[stage].get(name)


def test_simulate_where_the_theory_fails(call, path):
    words = ["--set", "pretraining.kappa=0.05", "--dimension", "20", "--runs", "2"]
    outcome = call("simulate", path, *words, "--json")
    assert outcome.code == 0
    warned = [line for line in outcome.err.splitlines() if line.startswith("lorastate: ")]
    assert len(warned) == 1 and "Pre-training: no theory to compare with: too_narrow" in warned[0]
    assert outcome.json["theory_codes"] == {"pretraining": "too_narrow", "finetuning": "upstream"}
    for stage in ("pretraining", "finetuning"):
        for entry in outcome.json[stage].values():
            assert entry["theory"] is None and entry["gap"] is None and np.isfinite(entry["mean"])
    assert call("simulate", path, *words).code == 0


def test_simulate_where_a_search_of_the_theory_fails(call, path, monkeypatch):
    def fail(*_, **__):
        raise SolveError("finetuning", Code.stalled)

    monkeypatch.setattr(solution, "predict", fail)
    outcome = call("simulate", path, "--dimension", "20", "--runs", "1", "--set", "finetuning.recalibration=noise")
    assert outcome.code == 0 and "no theory to compare with: finetuning: stalled" in outcome.err
    assert "Simulation at D = 20" in outcome.out  # the b of least noise needs pre-training alone
    outcome = call("simulate", path, "--dimension", "20", "--runs", "1", "--set", "finetuning.recalibration=error")
    assert outcome.code == 3 and outcome.out == ""


def test_simulate_options(call, path):
    small = ["--dimension", "20", "--runs", "2"]
    outcome = call("simulate", path, *small, "--map-starts", "2", "--json")
    assert outcome.code == 0 and outcome.json["pretraining"]["map_start_spread"]["mean"] >= 0
    assert "moves has no meaning for stage = 'both'" in call("simulate", path, *small, "--moves", "2").message
    alone = ["--stage", "finetuning"]
    assert "map_starts has no meaning" in call("simulate", path, *alone, "--map-starts", "2").message
    assert "starts = 0 is out of range" in call("simulate", path, *alone, "--starts", "0").message
    assert "--dimension 5 is out of range" in call("simulate", path, *alone, "--dimension", "5").message


def test_simulate_fine_tuning_alone(call, path):
    words = ["--stage", "finetuning", "--dimension", "40", "--runs", "2", "--starts", "2", "--moves", "1"]
    outcome = call("simulate", path, *words, "--json")
    assert outcome.code == 0
    data, theory = outcome.json, solution.predict(load_setting(path)).summary()["finetuning"]
    assert (data["stage"], data["dimension"], data["runs"], data["starts"], data["moves"]) == (
        "finetuning",
        40,
        2,
        2,
        1,
    )
    assert data["setting"] == setting_to_dict(load_setting(path)) and data["version"] == __version__
    assert set(data["searches"]) == {"informed", "random", "deep_random", "deep"}
    for search, rows in data["searches"].items():
        assert {"m", "q", "overlap", "train_loss", "train_error", "test_error"} == set(rows)
        assert data["converged"][search] == 2
        for name, entry in rows.items():
            assert np.isfinite([entry["mean"], entry["stderr"]]).all() and entry["theory"] == theory.get(name)
            assert np.mean(data["per_run"][search][name]) == pytest.approx(entry["mean"])
    assert np.shape(data["random_starts"]["train_loss"]) == (2, 2)
    shown = call("simulate", path, *words)
    assert shown.code == 0 and "Trained on the asymptotic channel at D = 40, 2 runs, seed 0" in shown.out
    assert "deep = lowest" in shown.out and "nan" not in shown.out


def test_simulate_one_run(call, path):
    outcome = call("simulate", path, "--dimension", "20", "--runs", "1")
    assert outcome.code == 0 and "Simulation at D = 20, 1 run, seed 0" in outcome.out
    assert "nan" not in outcome.out


def test_interrupted_simulation_shows_the_finished_runs(call, path, monkeypatch):
    whole = call("simulate", path, "--dimension", "20", "--runs", "2", "--json").json
    real, count = two_stages._one_run, []

    def one_run(*args):
        count.append(1)
        if len(count) > 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(two_stages, "_one_run", one_run)
    outcome = call("simulate", path, "--dimension", "20", "--runs", "5", "--json")
    assert outcome.code == 130 and "interrupted: 2 of 5 runs are complete and kept" in outcome.err
    assert outcome.json["runs"] == 2 and outcome.json["finetuning"] == whole["finetuning"]


def test_simulate_with_a_failed_run(call, path, monkeypatch):
    real = simulation.simulate

    def simulate(setting, **options):
        found = real(setting, **options)
        found.codes["finetuning"] = (Code.ok, Code.max_steps)
        return found

    monkeypatch.setattr(simulation, "simulate", simulate)
    outcome = call("simulate", path, "--dimension", "20", "--runs", "2", "--json")
    assert outcome.code == 3 and "1 of 2 runs failed and are left out (max_steps" in outcome.err
    assert outcome.json["converged"] == {"pretraining": 2, "finetuning": 1}
    assert outcome.json["finetuning"]["m"]["stderr"] is None


def test_figure(call, tmp_path, monkeypatch):
    called = []

    def draw(out, training, progress):
        called.append((out, training and (training.dimension, training.runs), progress))
        return [out / "figure.png"]

    monkeypatch.setattr(figures, "FIGURES", {"1": draw, "spectrum": draw, "rank": None})
    outcome = call("figure", "1", "--out", tmp_path, "--simulate", "--runs", "2")
    assert outcome.code == 0 and "figure.png" in outcome.out
    assert call("figure", "all", "--out", tmp_path).code == 0
    assert call("figure", "spectrum", "--out", tmp_path, "--simulate").code == 0
    one, no, large = (tmp_path, (None, 2), True), (tmp_path, None, True), (tmp_path, (None, 4), True)
    assert called == [one, no, no, large]


def test_a_figure_for_real(call, tmp_path, monkeypatch):
    """The spectrum on few nodes: what is drawn is a density, whose mass and moments are those of the learned map."""
    monkeypatch.setattr(maps, "NUMERICS", ls.Numerics(512, 1024, 2))
    outcome = call("figure", "spectrum", "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["spectrum.json", "spectrum.pdf", "spectrum.png"]
    assert (tmp_path / "spectrum.png").read_bytes()[:4] == b"\x89PNG"
    panels = json.loads((tmp_path / "spectrum.json").read_text())["panels"]
    assert [panel["setting"]["pretraining"]["activation"] for panel in panels] == ["identity", "softmax"]
    for panel in panels:
        x, density = np.array(panel["x"]), np.array(panel["density"])
        assert 0 < panel["atom"] < 1
        for k, want in enumerate((1 - panel["atom"], *panel["moments"])):
            assert trapezoid(x**k * density, x) == pytest.approx(want, rel=0.02)


def test_explain(call, path, monkeypatch):
    from lorastate.diagnosis import explain as report

    asked = []
    monkeypatch.setattr(report, "explain", lambda setting, progress: asked.append(setting) or FACTS)
    outcome = call("explain", path)
    assert outcome.code == 0 and len(asked) == 1
    for words in ("Delta_eff = 0.7 ", "b = 1.1", "out of range", "factor 2", "Bayes-optimal 0.6", "one branch",
                  "a glass", "p/q = 0.8"):  # fmt: skip
        assert words in outcome.out, words
    assert call("explain", path, "--json").json["best_lam"]["test_error"] == 0.02


FACTS = {
    "setting": {"pretraining": {"lam": 0.1}, "finetuning": {"inputs": "fresh"}},
    "predictions": {
        "pretraining": {"test_error": 0.9, "double_well_share": 0.02},
        "finetuning": {
            "test_error": 1.0,
            "test_error_frozen": 2.0,
            "overlap": 0.9,
            "recalibration": 1.0,
            "p": 0.8,
            "q": 1.0,
            "replicon": None,
        },
        "symmetry": "one-step broken",
    },
    "decomposition": {
        "label_noise": 0.25,
        "unexplained": 0.43,
        "miscalibration": 0.02,
        "total": 0.7,
        "best_scale": 1.1,
    },
    "best_lam": {"effective_noise": 0.04, "pretraining_test_error": 0.04, "test_error": 0.02, "overlap": None},
    "best_scale": {"effective_noise": 1.1, "test_error": 1.12},
    "bayes_optimal": {"pretraining": {"test_error": 0.5}, "finetuning": {"test_error": 0.6}},
    "stability": {
        "replicon": {"pretraining": 0.4, "finetuning": 0.2},
        "interpolation_threshold": 0.05,
        "weak_recovery_threshold": None,
        "weak_recovery_threshold_bayes_optimal": 0.1,
        "branches": {"m": (0.9, 0.9), "free_energy": (1.0, 1.0), "distinct": False},
    },
    "alpha": {"pretraining": 0.1, "finetuning": 3.0},
}


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lorastate", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, __version__, "")


# ---- what is shown meanwhile -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_what_is_done(monkeypatch):
    monkeypatch.setattr(screen, "_EVERY", 0.01)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with screen.at_work():
        for name, new, words in (
            ("solve_pretraining", True, "compiling (1): search of pre-training"),
            ("solve_pretraining", False, "\rsearch of pre-training"),
            ("_of_ones_own", True, "compiling (2): of ones own"),
        ):
            tell(name, new)
            until = time.monotonic() + 5
            while words not in terminal.getvalue() and time.monotonic() < until:
                time.sleep(0.01)
            assert words in terminal.getvalue()
    assert terminal.getvalue().lstrip("\r").startswith("starting, 0 s")
    tell("solve_pretraining", True)  # nobody listens any more


def test_a_pipe_sees_nothing_of_it(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with screen.at_work():
        tell("solve_pretraining", True)
    assert pipe.getvalue() == ""


def test_programs_say_what_they_do():
    heard = []

    def twice(x):
        return 2 * x

    program = Program(twice)
    with listening(lambda *said: heard.append(said)):
        for x in (jnp.ones(2), jnp.ones(2), jnp.ones(3)):
            program(x)
    assert heard == [("twice", True), ("twice", False), ("twice", True)]


def test_predict_only_what_is_asked(call, path, few_labels):
    alone = call("predict", path, "--only", "pretraining", "--json")
    both = call("predict", path, "--json")
    assert alone.code == 0 and "finetuning" not in json.loads(alone.out)
    assert json.loads(alone.out)["pretraining"] == json.loads(both.out)["pretraining"]
    shown = call("predict", path, "--only", "pretraining").out
    assert "Pre-training ok, residual" in shown and "E, noisy labels" in shown
    limits = call("predict", path, "--only", "limits", "--json")
    found = LIMITS(load_setting(path)).summary()
    assert limits.code == 0 and all(json.loads(limits.out)[stage] == found[stage] for stage in found)
    assert "Bayes-optimal, fresh inputs" in call("predict", path, "--only", "limits").out
    failed = call("predict", path, "--only", "pretraining", "--set", "pretraining.kappa=0.01")
    assert failed.code == 3 and "too_narrow" in failed.message
