#!/usr/bin/env bash
# compose.sh: the whole of compose.yaml against a Docker engine, from the build to the last container's end.
#
#   tests/e2e/compose.sh [--no-build] [--keep]
#
# What it shows, a line a step with its seconds, and at the end one line of JSON:
#   everything is healthy within 90 s of `up --wait`, and a second `up` changes nothing;
#   a run through it ends with the numbers of the embedded stack, while
#     workers are scaled to 3 and back, the student is swapped through gRPC, and every container dies once;
#   the run keeps its student and a new one gets the new; a wrong and a missing secret are one clear message each.
#
# Needs: docker with compose 2.24 on PATH (DOCKER_HOST is honoured), and a Python with this project for the embedded run
# (PYTHON, default .venv/bin/python). Ports are chosen by the engine, names by COMPOSE_PROJECT_NAME, so it disturbs no
# other stack. BUILD_NETWORK=host: builds use the host's network. HEALTHY_SECONDS: another limit than 90, for a slow or
# busy machine. EXPECTED=FILE: summary of the embedded run, read if it is there, else written.
# Exit code 0: all of it was seen; 1: not, and the last line says what.
set -euo pipefail
cd "$(dirname "$0")/../.."

BUILD=1 KEEP=
for word in "$@"; do
  case $word in
    --no-build) BUILD= ;;
    --keep) KEEP=1 ;;
    *) sed -n '2,17p' "$0"; exit 2 ;;
  esac
done
PYTHON=${PYTHON:-.venv/bin/python}
HEALTHY_SECONDS=${HEALTHY_SECONDS:-90}
# A container that was killed is well again within this, on a busy machine too.
AGAIN_SECONDS=${AGAIN_SECONDS:-180}
RUN_SECONDS=${RUN_SECONDS:-1500}
ROUNDS=${ROUNDS:-8}
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-preceptor-e2e}
export ORCHESTRATOR_PORT=0 STUDENT_PORT=0 EVALUATOR_PORT=0 REPORT_PORT=0 WORKERS=2
export CONFIG=configs/e2e.toml
# Nothing of a .env that lies here, and nothing that this shell happens to have set.
unset COMPOSE_FILE COMPOSE_PROFILES SECRETS STUDENTS RUNS TLS
for name in $(compgen -v PRECEPTOR_ || true); do [ "$name" = PRECEPTOR_VERSION ] || unset "$name"; done

FOLDER=$(mktemp -d)
FACTS=$FOLDER/facts
: > "$FACTS"
STEP=begin
BEGAN=$SECONDS

say() { printf '[%4ss] %s\n' "$((SECONDS - BEGAN))" "$*"; }
fact() { printf '%s\t%s\n' "$1" "$2" >> "$FACTS"; }
fail() { FAILED="$*"; exit 1; }
step() { STEP=$1; STARTED=$SECONDS; }
done_step() { say "$STEP: $* ($((SECONDS - STARTED)) s)"; fact "seconds_${STEP// /_}" "$((SECONDS - STARTED))"; }

# Not to be confused with a .env of whoever works here.
printf '' > "$FOLDER/env"
cat > "$FOLDER/override.yaml" <<YAML
services:
  evaluator:
    # Cut into smaller batches, a trial may differ in its last bits; so a batch may be lost more often before that.
    environment: { PRECEPTOR_TRIAL_ATTEMPTS: 20 }
  almanac: { volumes: ["$FOLDER/e2e.toml:/opt/preceptor/configs/e2e.toml:ro"] }
  cli: { volumes: ["$FOLDER/e2e.toml:/opt/preceptor/configs/e2e.toml:ro"] }
YAML
compose() { docker compose --env-file "$FOLDER/env" --file compose.yaml --file "$FOLDER/override.yaml" "$@"; }
cli() { compose run --rm --no-deps -T cli "$@"; }
# preceptor in the orchestrator's container, which is quicker than a container of its own
inside() { compose exec -T orchestrator preceptor "$@"; }
field() { "$PYTHON" -c 'import json, sys; value = json.load(sys.stdin)
for name in sys.argv[1].split("."): value = value[int(name)] if isinstance(value, list) else value.get(name)
print(value)' "$1"; }

leave() {
  code=$?
  trap - EXIT
  if [ "$code" != 0 ]; then
    say "FAILED in $STEP: ${FAILED:-see above}"
    fact failed "$STEP: ${FAILED:-exit code $code}"
    compose ps --all 2>/dev/null || true
    compose logs --no-color --tail 15 2>/dev/null || true
  fi
  if [ -z "$KEEP" ]; then
    compose --profile '*' down --volumes --remove-orphans --timeout 20 > /dev/null 2>&1 || true
  fi
  "$PYTHON" - "$FACTS" "$code" "$((SECONDS - BEGAN))" <<'PY'
import json, sys
facts = {}
for line in open(sys.argv[1]):
    name, _, value = line.rstrip("\n").partition("\t")
    facts[name] = int(value) if value.isdecimal() else value
print(json.dumps({"good": sys.argv[2] == "0", **facts, "seconds": int(sys.argv[3])}))
PY
  rm -rf "$FOLDER"
  exit "$code"
}
trap leave EXIT
trap 'exit 130' INT TERM

# The config of all runs here, whole: small, and long enough for everything that is done to it.
"$PYTHON" -m preceptor run tests/e2e/small.toml --set "rounds.count=$ROUNDS" --set rounds.tasks=6 --set rounds.self_edits=6 \
  --set tasks.train=12 --set tasks.heldout=6 --dry-run > "$FOLDER/e2e.toml"
chmod 755 "$FOLDER"; chmod 644 "$FOLDER/e2e.toml"

step build
if [ -n "$BUILD" ]; then
  compose --profile cli config --format json > "$FOLDER/build.json"
  "$PYTHON" - "$FOLDER/build.json" "${BUILD_NETWORK:-}" <<'PY'
import json, sys
path, network = sys.argv[1:]
project = json.load(open(path))
for service in project["services"].values():
    service.pop("depends_on", None)
    if network and "build" in service:
        service["build"]["network"] = network
json.dump(project, open(path, "w"))
PY
  docker compose --env-file "$FOLDER/env" --file "$FOLDER/build.json" --project-directory "$PWD" build > "$FOLDER/build.log" 2>&1 \
    || { tail -40 "$FOLDER/build.log"; fail "the images cannot be built"; }
fi
sizes=
for target in teacher student evaluator orchestrator worker cli; do
  bytes=$(docker image inspect --format '{{.Size}}' "preceptor-$target:${PRECEPTOR_VERSION:-0.1.0}")
  sizes+=" $target $((bytes / 1000000)) MB,"
  fact "image_mb_$target" "$((bytes / 1000000))"
done
done_step "images:${sizes%,}"

step "embedded run"
if [ -s "${EXPECTED:-}" ]; then
  mkdir "$FOLDER/expected"
  cp "$EXPECTED" "$FOLDER/expected/summary.json"
else
  PRECEPTOR_HOME=$FOLDER/embedded PRECEPTOR_TRIAL_ATTEMPTS=20 "$PYTHON" -m preceptor run "$FOLDER/e2e.toml" --workers 2 \
    --out "$FOLDER/expected" > "$FOLDER/embedded.log" 2>&1 || { tail -20 "$FOLDER/embedded.log"; fail "the embedded run failed"; }
  rm -rf "$FOLDER/embedded"
  [ -z "${EXPECTED:-}" ] || cp "$FOLDER/expected/summary.json" "$EXPECTED"
fi
done_step "$(field throughput.trials < "$FOLDER/expected/summary.json") trials"

step up
compose --profile '*' down --volumes --remove-orphans --timeout 20 > /dev/null 2>&1 || true
compose up --detach --no-build --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "up --wait failed"; }
healthy=$((SECONDS - STARTED))
done_step "all healthy"
[ "$healthy" -le "$HEALTHY_SECONDS" ] || fail "all healthy after $healthy s, promised are $HEALTHY_SECONDS s"

step "up again"
before=$(compose ps --quiet | sort)
compose up --detach --no-build --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "a second up --wait failed"; }
[ "$before" = "$(compose ps --quiet | sort)" ] || fail "a second up made other containers"
done_step "nothing changed"

step "run begins"
end=$((SECONDS + 300)) run=
until [ -n "$run" ] && [ "$(inside evaluations queue --json 2>/dev/null | field trials_done 2>/dev/null || echo 0)" -gt 0 ]; do
  [ $SECONDS -lt $end ] || fail "no evaluation is done after 300 s"
  sleep 2
  run=$(inside runs list --json | field runs.0.id 2>/dev/null || true)
done
done_step "$run is under way"

state() { inside runs show "$run" --json | field state; }
goes_on() { # WHAT: fails if the run is over; an orchestrator that is just being started again is waited for
  local end=$((SECONDS + AGAIN_SECONDS)) now=
  until now=$(state 2>/dev/null) && [ -n "$now" ]; do
    [ $SECONDS -lt $end ] || fail "the orchestrator does not say how the run is"
    sleep 1
  done
  case $now in RUNNING | PENDING) ;; *) fail "the run is over ($now) before $1; more rounds: ROUNDS=$((ROUNDS * 2))" ;; esac
}
alive() { inside evaluations queue --json | field workers_alive; }
until_workers() {
  local end=$((SECONDS + AGAIN_SECONDS))
  until [ "$(alive 2>/dev/null || true)" = "$1" ]; do
    [ $SECONDS -lt $end ] || fail "$1 workers are wanted, $(alive) beat"
    sleep 1
  done
}

step "scale to 3"
goes_on "it is scaled"
compose up --detach --no-build --no-recreate --scale worker=3 --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "scaling failed"; }
until_workers 3
done_step "3 workers beat"

step "swap the student"
goes_on "the swap"
models=$(compose exec -T student python -c 'from preceptor.stack import shipped_models; print(shipped_models())')
inside students register other --source "$models/student_qwen2" > "$FOLDER/register.log" 2>&1 || { cat "$FOLDER/register.log"; fail "it cannot be registered"; }
inside students activate other --wait > "$FOLDER/activate.log" 2>&1 || { cat "$FOLDER/activate.log"; fail "it cannot be activated"; }
done_step "$(tail -1 "$FOLDER/activate.log")"

step "scale to 2"
goes_on "it is scaled back"
compose up --detach --no-build --no-recreate --scale worker=2 --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "scaling back failed"; }
until_workers 2
done_step "2 workers beat"

# Every process of a container dies at once, as when the kernel ends it for memory; the engine's restart policy brings
# it back. (`docker kill` counts as the operator's own stop: the policy leaves the container down. That is done last.)
restarts() { docker inspect --format '{{.RestartCount}}' "$1"; }
well() { docker inspect --format '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' "$1"; }
until_well() {
  local end=$((SECONDS + AGAIN_SECONDS))
  until case $(well "$1") in healthy | running) true ;; *) false ;; esac; do
    [ $SECONDS -lt $end ] || fail "$2 is $(well "$1") $AGAIN_SECONDS s after its death"
    sleep 0.5
  done
}
kills=0
for service in worker redis teacher postgres evaluator student orchestrator worker almanac; do
  number=1; [ "$kills" != 7 ] || number=2
  step "kill $service-$number"
  goes_on "$service is killed"
  container=$(compose ps --quiet "$service" | sed -n "${number}p")
  user=10001; case $service in redis | postgres) user=$service ;; esac
  before=$(restarts "$container")
  docker exec --user "$user" "$container" sh -c 'kill -9 -1' > /dev/null 2>&1 || true
  end=$((SECONDS + 30))
  until [ "$(restarts "$container")" -gt "$before" ]; do
    [ $SECONDS -lt $end ] || fail "$service was not started again"
    sleep 0.2
  done
  kills=$((kills + 1))
  done_step "died and was started again"
done
step "all well"
for container in $(compose ps --quiet); do until_well "$container" "$(docker inspect --format '{{.Name}}' "$container")"; done
done_step "after $kills deaths"
step "docker kill"
goes_on "a container is killed from outside"
container=$(compose ps --quiet worker | head -1)
docker kill --signal KILL "$container" > /dev/null
compose up --detach --no-build --no-recreate --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "up after docker kill failed"; }
until_workers 2
kills=$((kills + 1))
fact kills "$kills"
done_step "a worker is gone, and up brings it back"

step "run ends"
end=$((SECONDS + RUN_SECONDS))
until [ "$(state 2>/dev/null || true)" = SUCCEEDED ]; do
  case $(state 2>/dev/null || true) in FAILED | CANCELLED) inside runs show "$run"; fail "the run is $(state)" ;; esac
  [ $SECONDS -lt $end ] || fail "the run has not ended after $RUN_SECONDS s"
  sleep 2
done
# The world's own service has written the results, and shows them over HTTP.
page=http://$(compose port almanac 8080)/almanac
end=$((SECONDS + 120))
until "$PYTHON" -c 'import sys, urllib.request as web
for name in ("summary.json", "report.html"):
    open(f"{sys.argv[2]}/{name}", "wb").write(web.urlopen(f"{sys.argv[1]}/{name}", timeout=10).read())' "$page" "$FOLDER" 2> /dev/null; do
  [ $SECONDS -lt $end ] || fail "$page does not show the results"
  sleep 1
done
done_step "$run SUCCEEDED, its report is at $page/report.html"

step "same result"
PYTHONPATH=. "$PYTHON" - "$FOLDER/expected/summary.json" "$FOLDER/summary.json" <<'PY' || fail "another result than the embedded run's"
import json, sys
from tests.chaos.proof import differences
expected, found = (json.load(open(path)) for path in sys.argv[1:])
different = differences(expected, found)
print("\n".join(different[:20]), end="")
sys.exit(bool(different))
PY
[ "$(field student.name < "$FOLDER/summary.json")" = almanac ] || fail "the run did not keep its student"
fact same_result yes
done_step "as embedded; its student: almanac"

step "next run"
cli run configs/e2e.toml --connect --out /runs/next --set rounds.count=1 --set rounds.tasks=2 --set tasks.heldout=0 --json > "$FOLDER/next.log" 2>&1 \
  || { tail -5 "$FOLDER/next.log"; fail "it failed"; }
[ "$(tail -1 "$FOLDER/next.log" | field summary.student.name)" = other ] || fail "it did not get the new student"
done_step "its student: other"

# A secret that is not right: one message that says what and what to do, a few starts, no endless loop.
secret() { compose run --rm --no-deps -T --entrypoint sh secrets -c "cd /run/secrets; $1" > /dev/null 2>&1; }
message() { # SERVICE WORDS: its log has a line with the words, which is then in SAID
  local end=$((SECONDS + 90)) log=$FOLDER/message.log
  compose up --detach --no-build --no-deps --force-recreate "$1" > /dev/null 2>&1
  until compose logs --no-color --no-log-prefix "$1" > "$log" 2>&1; grep -q "$2" "$log"; do
    [ $SECONDS -lt $end ] || { tail -5 "$log"; fail "$1 does not say: $2"; }
    sleep 1
  done
  if grep -q Traceback "$log"; then fail "$1 shows a traceback"; fi
  SAID=$(grep -m 1 "$2" "$log" | sed "s/^.\\[2K//" | cut -c 1-180) # some versions of compose clear the line first
}
step "wrong Redis password"
secret 'cp redis_password kept && rm redis_password && echo wrong > redis_password && chmod 440 redis_password'
message evaluator 'Redis at redis://:\*\*\*@redis:6379/0 refuses'
done_step "$SAID"
step "wrong PostgreSQL password"
secret 'mv -f kept redis_password; cp postgres_password kept && rm postgres_password && echo wrong > postgres_password && chmod 440 postgres_password'
message student 'password authentication failed'
done_step "$SAID"
step "missing secret"
secret 'mv -f kept postgres_password; mv token kept'
message teacher 'token.*No such file'
done_step "$SAID"
secret 'mv -f kept token'

step "well again"
compose up --detach --no-build --force-recreate --wait > "$FOLDER/up.log" 2>&1 || { tail -15 "$FOLDER/up.log"; fail "up after the secrets were put right failed"; }
done_step "with the right secrets"

step down
compose --profile '*' down --volumes --timeout 60 > "$FOLDER/down.log" 2>&1 || { tail "$FOLDER/down.log"; fail "down failed"; }
left=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME"; docker volume ls --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME")
[ -z "$left" ] || fail "left behind: $left"
done_step "nothing is left"
