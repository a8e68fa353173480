#!/bin/sh
# install.sh EXTRA...: installs what these extras need, at the versions of constraints.txt, and leaves out what no
# process of ours uses. TORCH_INDEX_URL: an index to look in too, for other builds of torch than pip's own choice.
set -eu
python /src/image/requirements.py /src/pyproject.toml "$@" > /tmp/requirements.txt
PYTHONDONTWRITEBYTECODE=1 pip install --no-cache-dir --no-compile --disable-pip-version-check --root-user-action=ignore \
  --constraint /src/constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
  --requirement /tmp/requirements.txt
rm /tmp/requirements.txt

cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# Tests that packages bring along, and what is for compilers and type checkers.
find . -depth -type d \( -name tests -o -name test \) -exec rm -rf {} +
rm -rf torch/include torch/share/cmake numpy/_core/include numpy/f2py numpy/distutils sqlalchemy/testing
find . -name '*.a' -delete
# botocore describes every service of AWS; artifacts need one, and its credentials two more.
if [ -d botocore/data ]; then
  find botocore/data -mindepth 1 -maxdepth 1 -type d \
    ! -name s3 ! -name sts ! -name 'sso*' -exec rm -rf {} +
fi
# Celery's own command line, which nobody here calls.
rm -rf prompt_toolkit prompt_toolkit-*.dist-info wcwidth wcwidth-*.dist-info click_repl click_repl-*.dist-info

# Where models run, all is compiled, since nobody can write beside it later; also what torch needs of Python's library.
if [ -d torch ]; then
  python -m compileall -q . > /dev/null || true  # some packages carry templates that end in .py
  PYTHONDONTWRITEBYTECODE='' python -c "import celery, redis, grpc, psycopg, s3fs, httpx2, rich.live, torch, transformers, peft"
  exit
fi

# A light image compiles what its services import, by starting them (first_start.py): that is half of it.
# What draws formatted source code; and what fetches weights from the hub faster, where there are none.
rm -rf pygments pygments-*.dist-info hf_xet hf_xet-*.dist-info
find . -type f \( -name '*.c' -o -name '*.h' -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' \) -delete
rm -f numpy/_core/_simd.*.so numpy/_core/*_tests.*.so
# Pictures here are SVG in one font, whose letters the reader's program draws: no other fonts, no bitmaps of formats
# that nobody reads, and of fontTools the one table that matplotlib asks for.
if [ -d matplotlib ]; then
  rm -rf matplotlib/mpl-data/sample_data matplotlib/mpl-data/fonts/afm matplotlib/mpl-data/fonts/pdfcorefonts
  find matplotlib/mpl-data/fonts/ttf -name '*.ttf' ! -name DejaVuSans.ttf ! -name DejaVuSans-Bold.ttf ! -name 'LastResort*' -delete
  find fontTools -mindepth 1 -maxdepth 1 ! -name __init__.py ! -name agl.py ! -name misc -exec rm -rf {} +
  find fontTools -name '*.so' -delete
  rm -f PIL/_avif.*.so PIL/_webp.*.so PIL/_imagingft.*.so PIL/_imagingcms.*.so PIL/_imagingtk.*.so
  for library in avif brotli freetype harfbuzz lcms2 png16 sharpyuv webp; do rm -f pillow.libs/lib$library*; done
fi
python /src/image/strip.py .
