#!/bin/sh
# Fills a folder with the pictures, flags and outlines that the families pictures and maps are drawn from:
#   scripts/fetch_pictures.sh FOLDER && export FLASHSLOTH_PICTURES_DIR=FOLDER
# Needs npm and pip install 'flashsloth[draw]'; PYTHON names the interpreter. About 260 MB of packages, 40 MB of pictures.
set -eu
folder=${1:?name a folder}
mkdir -p "$folder"
test -f "$folder/package.json" || echo '{"private": true}' > "$folder/package.json"
# no package needs its install scripts
npm install --prefix "$folder" --ignore-scripts --no-audit --no-fund --save-exact \
    @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/fluent-emoji@1.2.7 \
    @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji-high-contrast@1.2.6 \
    @iconify-json/fxemoji@1.2.2 @iconify-json/twemoji@1.2.5 @mdi/svg@7.4.47 flag-icons@7.5.0 \
    @iconify-json/circle-flags@1.2.11 world-atlas@2.0.2
"${PYTHON:-python3}" -c 'import sys; from flashsloth.synthetic.sprites import rasterise_pictures as rasterise
print(rasterise(sys.argv[1]))' "$folder"
