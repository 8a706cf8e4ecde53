# A site's process with the data, for the CPU, and umbel-client. It needs no network.
#
#   docker build -f deploy/docker/trainer-cpu.Dockerfile -t umbel-trainer-cpu .
#
# A release names its base by digest: --build-arg VERSION=0.1.0 --build-arg BASE=python@sha256:...
# Its packages come from deploy/requirements/client-cpu.txt, by hash.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG BASE
ARG VERSION=unreleased
RUN case "${VERSION} ${BASE}" in \
        unreleased\ *|*@sha256:*) ;; \
        *) echo "BASE: found ${BASE}, accepted for release ${VERSION}: an image by its digest, NAME@sha256:..." >&2; exit 1 ;; \
    esac
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY deploy/requirements/build.txt deploy/requirements/client-cpu.txt deploy/requirements/
RUN python3 -m venv tools && tools/bin/pip install --require-hashes -r deploy/requirements/build.txt
# The place of the PyTorch build without CUDA. Its hash must be the one in the file above.
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
RUN python3 -m venv /opt/umbel \
    && /opt/umbel/bin/pip install --require-hashes --find-links "${TORCH_WHEELS}" \
        -r deploy/requirements/client-cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY client client
# The time that is written into the wheel: that of the commit.
ARG SOURCE_DATE_EPOCH=315532800
RUN tools/bin/python -m build --wheel --no-isolation --outdir dist \
    && /opt/umbel/bin/pip install --no-index --no-deps dist/*.whl \
    && /opt/umbel/bin/pip check \
    && /opt/umbel/bin/pip uninstall --yes pip \
    && rm /opt/umbel/bin/umbel-server /opt/umbel/bin/umbel-simulate

FROM ${BASE}
ARG BASE
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="umbel-trainer-cpu" \
      org.opencontainers.image.description="Umbel: the trainer of a site, on the CPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
# A new volume takes the owner and mode of its folder here.
RUN groupadd --gid 10000 umbel \
    && useradd --uid 10001 --gid umbel --no-create-home --home-dir /tmp --shell /usr/sbin/nologin umbel \
    && install -d -o umbel -g umbel -m 0700 /var/lib/umbel /var/lib/umbel-ledgers \
    && install -d -o umbel -g umbel -m 0770 /run/umbel
COPY --from=build /opt/umbel /opt/umbel
# Only /var/lib/umbel, /var/lib/umbel-ledgers, /run/umbel and /tmp are written to, so the root may be read-only.
# hadolint ignore=DL3064  # TOKENIZERS_PARALLELISM is no secret
ENV PATH=/opt/umbel/bin:${PATH} \
    HOME=/tmp \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false
USER 10001:10000
WORKDIR /umbel
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-P", "-m", "umbel_host.probe", "unix:/run/umbel/trainer.sock"]
CMD ["python", "-P", "-m", "umbel_client.trainer_process", "client.toml"]
