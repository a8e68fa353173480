"""How much of anything one request, file or config may hold: every limit once, with its reason.

A limit is far above any sensible use and below what would keep a service busy for minutes or fill its memory. Services
refuse what is beyond (INVALID_REQUEST, BAD_CONFIG, BAD_TASK_FILE, BAD_SELF_EDIT) before anything is stored or sent; the
contract's comments name the limits. A whole message is bounded by ``preceptor.server.MAX_MESSAGE_BYTES``.
"""

from __future__ import annotations

from preceptor.errors import PreceptorError

# Names and ids that others choose: they stand in logs, messages and keys of databases.
MAX_NAME_CHARACTERS = 256
# A path or hub id; no file system takes longer ones.
MAX_SOURCE_CHARACTERS = 4096
# What one page may cost in memory, and what a client gets that does not say.
MAX_PAGE, DEFAULT_PAGE = 1000, 100
# Of 18 digits: any number of a row, and no more than SQL's integers hold.
MAX_TOKEN_DIGITS = 18

# One text, and all documents of one self-edit together: a long novel.
MAX_TEXT_CHARACTERS = 1_000_000
MAX_DOCUMENTS = 1000
MAX_REPLAY_DOCUMENTS = 100_000
MAX_TITLE_CHARACTERS = 1000
# A question, an answer, a prompt's frame: students' contexts are not larger.
MAX_QUESTION_CHARACTERS = 20_000
# A question with all that stands before it: a passage, demonstrations.
MAX_PROMPT_CHARACTERS = 200_000
MAX_ALIASES = 64
# Of one bank. Each is asked of every trial.
MAX_QUESTIONS = 2000
MAX_PROBES = 10_000
# Demonstrations or queries of a few-shot task: real ones have up to ten.
MAX_PAIRS = 100
# Views of a query: each is asked.
MAX_VOTES = 64
# Of the documents that are made of a few-shot task for one trial: eight of them still fit into a message.
MAX_MADE_CHARACTERS = 4_000_000
MAX_LABELS = 64
MAX_REFERENCE_EDITS = 16
# More do not fit into one message, and the tasks of a run travel in one.
MAX_TASKS = 100_000

# A group of 1024 self-edits with 64 seeds would be days of work under one id.
MAX_SELF_EDITS = 1024
MAX_SEEDS = 64
MAX_TRIALS = 8192
# Evaluations that one call watches or names: those of a request of the largest kind.
MAX_EVALUATIONS = MAX_TRIALS
# Evaluations that a request to retry may name; without names it may mean any number.
MAX_RETRIED = 1000
# Answers that are graded while a client waits, each compared with its golds word by word; and all their characters.
MAX_GRADED = 10_000
MAX_GRADED_CHARACTERS = 1_000_000
# Sums of weighted terms stay finite.
MAX_WEIGHT = 1e6
MAX_KL = 100.0  # weight of a divergence; beyond 1 hardly anything is learnt
# Squares of rewards stay finite.
MAX_REWARD = 1e12

# Of a fine-tune, the student's or the teacher's: far above any sensible use, below what would keep a worker busy for
# days or take all its memory before it can say so.
MAX_RANK = 1024
MAX_ALPHA = 1e6
MAX_EPOCHS = 1024
MAX_BATCH_SIZE = 4096
MAX_REPLAY_SHARE = 0.9
MAX_TARGET_MODULES = 64
# Edits that one student stands on.
MAX_ADAPTERS = 64
# An answer, and a completion of a teacher.
MAX_NEW_TOKENS = 4096
MAX_COMPLETION_TOKENS = 131_072
MAX_SAMPLES = 64
# Below the least one, logits divided by it are no numbers any more.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0
MAX_RESAMPLES = 100
# Self-edits that one update learns from.
MAX_EXAMPLES = 100_000

# What nobody has used for so long may go, where nobody says otherwise; and for ever.
KEEP_DAYS, MAX_KEEP_DAYS = 30, 36_500
# Runs under way that a request to collect garbage may name.
MAX_OWNERS = 10_000

# A config that people wrote, with everything in it spelt out, has some thousand.
MAX_CONFIG_CHARACTERS = 50_000
# A file of tasks: what is in it travels in one message (preceptor.server.MAX_MESSAGE_BYTES).
MAX_FILE_BYTES = 64 * 2**20
# Reading ends there: a file with so many problems is another file than was meant.
MAX_PROBLEMS = 1000


def check_name(field: str, value: str, most: int = MAX_NAME_CHARACTERS) -> None:
    """Ids that a client chooses: not empty, not endless, and nothing that a log or a database could stumble over.

    Raises PreceptorError(INVALID_REQUEST).
    """
    if not 1 <= len(value) <= most or not value.isprintable():
        raise PreceptorError("INVALID_REQUEST", f"{field} must have 1..{most} printable characters", field=field)


def kept_seconds(days: int | None) -> float:
    """For how long a collector of garbage keeps what nobody uses. Raises PreceptorError(INVALID_REQUEST)."""
    days = KEEP_DAYS if days is None else days
    if days > MAX_KEEP_DAYS:
        raise PreceptorError("INVALID_REQUEST", f"keep_days must be at most {MAX_KEEP_DAYS}", field="keep_days")
    return days * 86400.0


def page_size(asked: int) -> int:
    """How many a page has, where ``asked`` is 0 or any other number."""
    return min(asked, MAX_PAGE) if asked else DEFAULT_PAGE


def page_token(token: str) -> int:
    """The number in a token of pages by number; 0 where there is no token.

    Raises PreceptorError(INVALID_REQUEST) for what such a service has never given.
    """
    if token and not (len(token) <= MAX_TOKEN_DIGITS and token.isascii() and token.isdigit()):
        raise PreceptorError("INVALID_REQUEST", "page_token is none that this service gave", field="page_token")
    return int(token or 0)
