"""Values in job files: whatever they hold, sbatch, the shell and Kubernetes read them back as they were, or one message
says what is allowed."""

import json
import random
import re
import shutil
import subprocess

import pytest

from mythos_ds.cluster.job_files import _seconds
from mythos_ds.errors import ConfigError
from tests.helpers.mains import load_main

render_launch = load_main("tools/render_launch.py")
BASH = str(shutil.which("bash"))
SLURM = ["slurm", "--config", "1t.json"]
KUBERNETES = ["kubernetes", "--config", "1t.json", "--image", "i", "--claim", "c"]
PIECES = (
    *(
        "a",
        "0",
        " ",
        "  ",
        "'",
        '"',
        "\\",
        "\\\\",
        "$",
        "$$",
        "$(id)",
        "$(NNODES)",
        "$((1))",
        "`id`",
        "${HOME}",
        "#",
        "#= name",
    ),
    *(
        "\n",
        "\r\n",
        "\n#SBATCH --uid=0\n",
        "\t",
        "\x0b",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\u200b",
        "é",
        "漢",
        "🙂",
    ),
    *(
        ";",
        "&&",
        "|",
        ">x",
        "*",
        "?",
        "~",
        "!",
        "{a,b}",
        "[x]",
        ": ",
        "- ",
        "--- ",
        "%a",
        "%j",
        ",",
        "=",
        "<<E",
        "\\n",
        "@",
        "|-",
    ),
    *("null", "yes", "&x", "*x", "!!python/object/apply:os.system [id]", "{{x}}", "\\u0041", "\\1", "\\g<0>"),
)


def render(*arguments):
    text: str = render_launch.render(render_launch.parser().parse_args(list(arguments)))
    return text


def made(seed):
    pick = random.Random(seed)
    return "x" + "".join(pick.choice(PIECES) for _ in range(pick.randint(1, 8)))


def directives(text):
    """The options of #SBATCH up to the first command, as sbatch reads them: quotes, backslashes, comments, words."""
    found = []
    for line in re.split(r"\n", text):
        if not line.startswith("#SBATCH"):
            if line and not line.startswith("#"):
                break
            continue
        words: list[str] = []
        word, quote, at, begun = "", "", len("#SBATCH"), False
        while at < len(line):
            letter = line[at]
            if letter == "\\":
                at, begun = at + 1, True
                word += line[at]
            elif quote:
                word, quote = (word, "") if letter == quote else (word + letter, quote)
            elif letter in "\"'":
                quote, begun = letter, True
            elif letter == "#":
                break
            elif letter.isspace():
                words, word, begun = ([*words, word] if begun else words), "", False
            else:
                word, begun = word + letter, True
            at += 1
        assert not quote, line
        found += words + ([word] if begun else [])
    return found


def training_arguments(text, **variables):
    """What the shell makes of the script's arguments; nothing else of the script is run."""
    start = text.index("\narguments=(") + 1
    end = text.index("# scancel")
    script = text[start:end] + "\nprintf '%s\\0' \"$@\""
    done = subprocess.run(
        [BASH, "-uc", script, "bash"],
        env={"PATH": "/nowhere", **variables},
        capture_output=True,
        check=True,
        timeout=20,
    )
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("seed", range(60))
def test_the_shell_reads_arguments_back(seed):
    folder, prompt = made(seed), made(seed + 1000)
    text = render(*SLURM, "--run-dir", folder, f"monitor.sample_prompts=[{_json(prompt)}]")
    arguments = training_arguments(text)
    assert arguments == ["--config", "1t.json", "--run-dir", folder, f"monitor.sample_prompts=[{_json(prompt)}]"]
    plain = render(*SLURM)
    assert directives(text) == directives(plain)


def _json(text):
    return json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("seed", range(60))
def test_sbatch_reads_values_back_or_they_are_refused(seed):
    value = made(seed)
    options = ["--constraint", value, "--sbatch", f"comment={value}", f"--sbatch=--mail-user={value}"]
    plain = directives(render(*SLURM))
    if not value.isprintable():
        with pytest.raises(ConfigError, match=r"--constraint: given .*one line of letters that can be printed"):
            render(*SLURM, *options)
        with pytest.raises(ConfigError, match="--sbatch comment: given"):
            render(*SLURM, *options[2:])
        return
    found = directives(render(*SLURM, *options))
    assert set(found) - set(plain) == {f"--constraint={value}", f"--comment={value}", f"--mail-user={value}"}
    assert len(found) == len(plain) + 3


@pytest.mark.parametrize("seed", range(60))
def test_kubernetes_reads_values_back(seed):
    yaml = pytest.importorskip("yaml")
    values = [made(seed + 1000 * number) for number in range(4)]
    image, claim, folder, prompt = values
    override = f"monitor.sample_prompts=[{_json(prompt)}]"
    text = render(
        *KUBERNETES, "--image", image, "--claim", claim, "--run-dir", folder, "--mount", f"/{claim}", override
    )
    plain = list(yaml.safe_load_all(render(*KUBERNETES)))
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert [expanded(word) for word in container["args"]] == ["--config", "1t.json", "--run-dir", folder, override]
    assert container["image"] == image
    assert container["volumeMounts"][0]["mountPath"] == f"/{claim}"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    # Nothing else of the two objects has changed.
    other = plain[1]["spec"]["template"]["spec"]
    container |= {"args": other["containers"][0]["args"], "image": "i"}
    container["volumeMounts"][0]["mountPath"] = "/shared"
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = "c"
    assert [service, job] == plain


def expanded(text):
    """What Kubernetes makes of an argument: "$$" is "$", "$(NAME)" a variable's value, here of every name."""
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else "EXPANDED", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("100:00:00", 360_000), ("2-00:00:00", 172_800)),
        *(("1-0", 86_400), ("1-12", 129_600), ("1-12:30", 131_400), ("0-1:2:3", 3723), ("10-23:59:59", 950_399)),
        *(
            (text, 0)
            for text in ("", "a day", "1-", "-1", "1:60", "99:99:99", "1-24", "1-2:60", "1:2:3:4", "1 0", "٣:00:00")
        ),
        *((text, 0) for text in ("1\n", "2-00:00:00\n", "0", "0:00:00", "UNLIMITED", "1e3", "1.5", "9" * 40)),
    ],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert _seconds(text) == seconds
    if seconds > 300:
        assert f"--time={text}" in directives(render(*SLURM, "--time", text))
    elif not seconds:
        with pytest.raises(ConfigError, match=r"--time: given .*D-HH:MM:SS"):
            render(*SLURM, f"--time={text}")


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("partition", ["gpu", "a,b", "gpu-h100.x"], ["", "a b", "a\nb", "$(id)", "a,", "-x;", '"']),
        ("account", ["phys", "a_b@c", "proj+x"], ["", "a b", "a\n#SBATCH --uid=0", "`id`", "é"]),
        ("qos", ["high", "low-1"], ["", "a'b", "a\tb", "#"]),
        ("array", ["3", "0-3%1", "1,5,9%1", "0-30:10%1"], ["", "a", "3-", "%1", "1%0", "1 2", "1;id", "1\n", "٣"]),
    ],
)
def test_names_are_checked(option, right, wrong):
    for value in right:
        assert f"--{option}={value}" in directives(render(*SLURM, f"--{option}={value}"))
    for value in wrong:
        with pytest.raises(ConfigError, match=f"--{option}: given"):
            render(*SLURM, f"--{option}={value}")


def test_tasks_of_an_array_have_a_run_directory_each_or_run_one_after_the_other():
    with pytest.raises(ConfigError, match=r"in one run directory; allowed: .*0-3%1"):
        render(*SLURM, "--array", "0-3")
    text = render(*SLURM, "--array", "2-3", "--run-dir", "runs/x-%a", "training.seed=%a")
    wanted = ["--config", "1t.json", "--run-dir", "runs/x-{}", "training.seed={}"]
    assert training_arguments(text, SLURM_ARRAY_TASK_ID="3") == [word.format(3) for word in wanted]
    assert training_arguments(text) == [word.format("%a") for word in wanted]
    with pytest.raises(ConfigError, match=r"training\.seed"):
        render(*SLURM, "training.seed=%a")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        *(
            (f"{key}=1", f"{key} is said by")
            for key in ("nodes", "ntasks-per-node", "time", "--account", "array", "wrap")
        ),
        *(
            (pair, "allowed: key=value")
            for pair in ("", "=x", "-A=x", "A b=c", "x\n--y=1", "Key=1", "--=1", "a--b=1", "é=1")
        ),
    ],
)
def test_keys_of_sbatch_are_checked(pair, message):
    with pytest.raises(ConfigError, match="--sbatch: ") as caught:
        render(*SLURM, f"--sbatch={pair}")
    assert message.removeprefix("--") in str(caught.value)


@pytest.mark.parametrize(
    ("base", "option", "value"),
    [
        *[(SLURM, "--cpus", value) for value in (0, -1, 2**16, 10**30)],
        *[(SLURM, "--grace", value) for value in (0, -1, 10**30)],
        *[(SLURM, "--array", value) for value in ("7-0", "0-3,9-8%1", "1-0:2")],
        *[(KUBERNETES, "--restarts", value) for value in (-1, 2**31, 10**30)],
        *[(KUBERNETES, "--grace", value) for value in (0, 30, 10**30)],
    ],
)
def test_numbers_that_no_scheduler_holds_are_refused(base, option, value):
    with pytest.raises(ConfigError, match=rf"{option}: given {value}; allowed"):
        render(*base, f"{option}={value}")


def test_a_key_is_given_once_and_may_have_no_value():
    found = directives(render(*SLURM, "--sbatch", "exclusive", "--sbatch", "comment=", "--sbatch", "gres=gpu:h100:8"))
    assert {"--exclusive", "--comment=", "--gres=gpu:h100:8"} <= set(found)
    with pytest.raises(ConfigError, match="comment is given twice"):
        render(*SLURM, "--sbatch", "comment=a", "--sbatch=--comment=b")


@pytest.mark.parametrize("value", ["a\udcffb", "a\0b"])
@pytest.mark.parametrize("base", [[*SLURM, "--run-dir"], [*KUBERNETES, "--run-dir"], [*KUBERNETES, "--image"]])
def test_what_no_file_of_text_holds_is_refused(base, value):
    with pytest.raises(ConfigError, match="allowed: text"):
        render(*base, value)
