#!/usr/bin/env bash
# What README says, done as a newcomer does it: a clone in an empty folder, an empty home, an empty environment, README's own lines, until a
# second question to the server is answered warm. Prints what each step took. tests/newcomer.sh [WHEEL]
#
# With a WHEEL `make wheel` is left out, because it made that one. CARGO_TARGET_DIR may name a folder of builds to be used.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
wheel=${1:+$(realpath "$1")}
folder=$(mktemp -d)
mkdir -p "$folder/home"
PYTHON=$(command -v "${PYTHON:-python3}")
trap 'kill $server 2>/dev/null; rm -rf "$folder"' EXIT
server=""

# Of the machine only what README's prerequisites name.
clean() {
  env -i HOME="$folder/home" LANG=C.UTF-8 PATH="$folder/venv/bin:$(dirname "$(command -v cargo)"):$(dirname "$PYTHON"):/usr/bin:/bin" \
    CARGO_HOME="${CARGO_HOME:-$HOME/.cargo}" RUSTUP_HOME="${RUSTUP_HOME:-$HOME/.rustup}" ${CARGO_TARGET_DIR:+CARGO_TARGET_DIR="$CARGO_TARGET_DIR"} \
    bash -euo pipefail -c "cd '$folder/kvkeep' 2>/dev/null || cd '$folder'; $1"
}
steps=""
step() {
  local began=$SECONDS
  echo "-- $1"
  clean "$2"
  steps+=$(printf '%5d s  %s' $((SECONDS - began)) "$1")$'\n'
}
# README's code blocks of a language, those that hold a text: readme sh 'pip install'
readme() {
  "$PYTHON" - "$repo/README.md" "$1" "$2" <<'PY'
import pathlib, re, sys

readme, language, text = sys.argv[1:]
blocks = re.findall(rf"^```{language}\n(.*?)^```", pathlib.Path(readme).read_text(), flags=re.M | re.S)
(block,) = [block for block in blocks if text in block]
print(block, end="")
PY
}

if "$PYTHON" -c 'import socket; socket.create_connection(("127.0.0.1", 8080), 1)' 2>/dev/null; then
  echo "newcomer: something listens at port 8080 already, where README's server would" >&2
  exit 1
fi
step "git clone" "git clone --quiet '$repo' kvkeep && '$PYTHON' -m venv '$folder/venv'"
install=$(readme sh 'pip install dist' | grep 'pip install dist')
[ -z "$wheel" ] || install="mkdir dist && cp '$wheel' dist && ${install#make wheel && }"
step "install, by README's line for Python" "$install"
readme python 'print_stats' >"$folder/lines.py"
step "ten lines of Python" "python '$folder/lines.py'"
step "pip install openai" "pip install --quiet --disable-pip-version-check openai"
{ readme python 'import OpenAI'; echo 'print(answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens)'; } >"$folder/ask.py"
serve=$(readme sh 'kvkeep serve --model' | grep -m1 'kvkeep serve' | sed 's/ *#.*//')
clean "echo \$\$ >'$folder/pid'; exec $serve" >"$folder/serve.log" 2>&1 &
until [ -s "$folder/pid" ]; do sleep 0.05; done
server=$(cat "$folder/pid")
step "$serve, until it listens" "for i in \$(seq 600); do grep -q 'listening at' '$folder/serve.log' && exit; kill -0 $server || exit 1; sleep 0.5; done; exit 1"
step "the first answer" "python '$folder/ask.py' | tee '$folder/first'"
step "the second, warm" "python '$folder/ask.py' | tee '$folder/second'"
first=$(cat "$folder/first") second=$(cat "$folder/second")
warm=${second##* }
printf '\n%s' "$steps"
if [ "${first% *}" != "${second% *}" ] || [ "$warm" -eq 0 ]; then
  echo "FAIL newcomer: the second answer is another, or not warm: $second"
  exit 1
fi
echo "ok   newcomer: README's lines lead to a warm answer, $warm tokens of the prompt not computed again"
