#!/usr/bin/env bash
# A task from create to result with nothing but curl. Start `codeq serve --dev` first.
# usage: curl.sh [URL]
set -euo pipefail
url=${1:-http://localhost:8080}/v1/codeq

# call TOKEN PATH [JSON]: a POST when there is a body; a refusal ends the script with its text
call() {
    curl -sS --fail-with-body -H "Authorization: Bearer $1" ${3:+-d "$3"} "$url$2"
}
# member NAME: the first text member of this name in the JSON on standard input
member() {
    grep -o "\"$1\":\"[^\"]*\"" | head -1 | cut -d '"' -f 4
}

id=$(call dev-producer /tasks '{"command": "greet-by-curl", "payload": {"name": "Ada"}}' | member id)
echo "created $id"

# A worker: claims, works, sends its result. waitSeconds holds the answer back until there is work.
task=$(call dev-worker /tasks/claim \
    '{"commands": ["greet-by-curl"], "leaseSeconds": 60, "waitSeconds": 10}')
[ -n "$task" ] || { echo "nothing to do"; exit 0; }
claimed=$(member id <<<"$task")
# The attempt of this claim: if the lease was lost meanwhile, the result is refused.
attempt=$(grep -o '"attempts":[0-9]*' <<<"$task" | cut -d : -f 2)
echo "claimed $claimed, attempt $attempt"
call dev-worker "/tasks/$claimed/result" \
    "{\"status\": \"COMPLETED\", \"result\": \"Hello!\", \"attempt\": $attempt}" >/dev/null

# The producer: waits until the task has ended, at most ten seconds.
result=$(call dev-producer "/tasks/$id/result?waitSeconds=10")
echo "result: $(member result <<<"$result")"
