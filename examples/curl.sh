#!/usr/bin/env bash
# A question with curl alone, and what Replicate answers, whole.
set -euo pipefail

model=tu-usuario/nombre-modelo
api=${REPLICATE_BASE_URL:-https://api.replicate.com}/v1
token="Authorization: Bearer ${REPLICATE_API_TOKEN:?Escriba antes: export REPLICATE_API_TOKEN=r8_...}"

page=$(curl -fsS "$api/models/$model" -H "$token")
version=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["latest_version"]["id"])' <<<"$page")
curl -fsS "$api/predictions" -H "$token" -H 'Content-Type: application/json' -H 'Prefer: wait' \
  -d '{"version": "'"$version"'", "input": {"pregunta": "Dime un producto de limpieza que blanquee la ropa", "temperature": 0}}'
echo
