#!/bin/sh
# install.sh EXTRA...: installs what these extras need, at the versions of constraints.txt, and leaves out what no
# process of ours uses. TORCH_INDEX_URL: an index to look in too, for other builds of torch than pip's own choice.
set -eu
python /src/image/requirements.py /src/pyproject.toml "$@" > /tmp/requirements.txt
# The packages are compiled, since nobody can write beside them later; pip itself, used only here, is not.
PYTHONDONTWRITEBYTECODE=1 pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
  --constraint /src/constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
  --requirement /tmp/requirements.txt
rm /tmp/requirements.txt

cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# Tests that packages bring along, headers and static libraries.
find . -depth -type d \( -name tests -o -name test \) -exec rm -rf {} +
rm -rf torch/include torch/share/cmake numpy/_core/include sqlalchemy/testing
rm -rf matplotlib/mpl-data/sample_data numpy/f2py numpy/distutils
find . -name '*.a' -delete
# botocore describes every service of AWS; artifacts need one, and its credentials two more.
if [ -d botocore/data ]; then
  find botocore/data -mindepth 1 -maxdepth 1 -type d \
    ! -name s3 ! -name sts ! -name 'sso*' -exec rm -rf {} +
fi
# Celery's own command line, which nobody here calls; and what fetches weights from the hub faster, where there are none.
rm -rf prompt_toolkit prompt_toolkit-*.dist-info wcwidth wcwidth-*.dist-info click_repl click_repl-*.dist-info
[ -d torch ] || rm -rf hf_xet hf_xet-*.dist-info
# What the processes use of Python's own library, compiled too: a quarter of a second less at each start and probe.
[ -d torch ] && more="torch, transformers, peft" || more="sys"
PYTHONDONTWRITEBYTECODE='' python -c "import celery, redis, grpc, sqlalchemy, alembic, psycopg, s3fs, httpx2, rich.live, $more"
