# One file, one image for each process: docker build --target teacher .   (compose.yaml builds them all)
#
# The base is pinned by its tag; pin it by digest with
#   --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...   (docker buildx imagetools inspect python:3.11-slim tells it)
# Packages come from where pip looks by itself. On x86-64 its default torch brings CUDA along; for a smaller image
# without a GPU: --build-arg TORCH_INDEX_URL=https://...  with the address of PyTorch's CPU builds.
ARG PYTHON_IMAGE=python:3.11-slim

# The code, as a wheel. Whatever builds it stays here.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY preceptor preceptor
COPY teacher teacher
COPY student student
COPY evaluator evaluator
COPY orchestrator orchestrator
COPY worlds worlds
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# What all images share: a user without rights, folders that volumes are mounted at, and the packages of every service.
FROM ${PYTHON_IMAGE} AS light
ARG TORCH_INDEX_URL=
RUN echo 'preceptor:x:10001:10001::/var/lib/preceptor:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'preceptor:x:10001:' >> /etc/group \
 && install -d -o 10001 -g 10001 /var/lib/preceptor /var/lib/preceptor-gpu-locks /runs /students \
 && install -d -o 10001 -g 0 -m 0750 /run/secrets
RUN --mount=type=bind,source=deploy/image,target=/src/image \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    /src/image/install.sh postgres observability
# TOKENIZERS_PARALLELISM is no token.
# hadolint ignore=DL3064
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/preceptor \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/var/lib/preceptor/hub \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TOKENIZERS_PARALLELISM=false \
    OMP_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    PRECEPTOR_HOME=/var/lib/preceptor \
    PRECEPTOR_HOST=0.0.0.0
WORKDIR /opt/preceptor
LABEL org.opencontainers.image.title="Preceptor" \
      org.opencontainers.image.description="Trains a teacher to write study material that makes a student better" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM light AS light-app
RUN --mount=type=bind,source=deploy/image,target=/src/image \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    /src/image/install.sh server student evaluator
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    --mount=type=bind,source=deploy/image,target=/src/image \
    pip install --no-cache-dir --no-deps /wheel/*.whl \
 && PYTHONDONTWRITEBYTECODE='' python /src/image/first_start.py student evaluator
USER 10001:10001

FROM light-app AS student
EXPOSE 7102
HEALTHCHECK --interval=30s --timeout=30s --start-period=120s CMD ["preceptor", "probe", "student"]
ENTRYPOINT ["python", "-m", "student"]

FROM light-app AS evaluator
EXPOSE 7103
HEALTHCHECK --interval=30s --timeout=30s --start-period=120s CMD ["preceptor", "probe", "evaluator"]
ENTRYPOINT ["python", "-m", "evaluator"]

# It has no queue and no bucket, but draws.
FROM light AS orchestrator
RUN --mount=type=bind,source=deploy/image,target=/src/image \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    /src/image/install.sh postgres observability orchestrator
# The models that ship are the student's and the teacher's.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    --mount=type=bind,source=deploy/image,target=/src/image \
    pip install --no-cache-dir --no-deps /wheel/*.whl \
 && rm -rf /usr/local/lib/python3*/site-packages/worlds/almanac/models \
 && PYTHONDONTWRITEBYTECODE='' python /src/image/first_start.py orchestrator
USER 10001:10001
EXPOSE 7104
HEALTHCHECK --interval=30s --timeout=30s --start-period=120s CMD ["preceptor", "probe", "orchestrator"]
ENTRYPOINT ["python", "-m", "orchestrator"]

# Where models run: torch and transformers.
FROM light AS models
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,source=deploy/image,target=/src/image \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    /src/image/install.sh server teacher worker
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir --no-deps /wheel/*.whl
USER 10001:10001

FROM models AS teacher
EXPOSE 7101
HEALTHCHECK --interval=30s --timeout=30s --start-period=300s CMD ["preceptor", "probe", "teacher"]
ENTRYPOINT ["python", "-m", "teacher"]

FROM models AS worker
HEALTHCHECK --interval=30s --timeout=30s --start-period=300s CMD ["preceptor", "probe", "worker"]
ENTRYPOINT ["python", "-m", "student.worker"]

# The command line, and the chores of compose.yaml. Last, so that `docker build .` without a target gives it.
FROM light-app AS cli
COPY configs configs
COPY --chmod=0755 deploy/make_secrets.sh /usr/local/bin/make-secrets
ENTRYPOINT ["preceptor"]
CMD ["--help"]
