# Builds and measures bundles on x86 and Arm CPUs through ONNX Runtime. From the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t edgesam-deploy:cpu .
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Where pip looks besides its default index; with PyTorch's CPU builds there the image is about 4 GB smaller.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /src
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY docker/constraints.txt docker/
COPY engines engines
COPY export export
COPY edgesam_deploy edgesam_deploy
# The build dependencies obey the constraints too: through PIP_CONSTRAINT before pip 25.3, PIP_BUILD_CONSTRAINT since.
RUN python3 -m venv /opt/venv \
    && PIP_CONSTRAINT=docker/constraints.txt PIP_BUILD_CONSTRAINT=docker/constraints.txt \
        /opt/venv/bin/python -m pip install --no-cache-dir '.[export]'

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgesam-deploy, CPU" \
    org.opencontainers.image.description="Builds, verifies and measures Segment-Anything bundles on a CPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --no-create-home --home-dir /work --shell /usr/sbin/nologin edgesam \
    && install -d -m 1777 /kits /results /work
COPY --from=build /opt/venv /opt/venv
COPY benchmarks/collect.py /opt/edgesam-deploy/benchmarks/
COPY docker/bench.sh /opt/edgesam-deploy/docker/
# Any user may run it (--user): name and home do not come from /etc/passwd.
ENV HOME=/work \
    USER=edgesam \
    PATH=/opt/venv/bin:$PATH \
    EDGESAM_CACHE=/work/cache \
    EDGESAM_IMAGE="docker/cpu.Dockerfile on ${BASE_IMAGE}" \
    EDGESAM_REVISION=${REVISION} \
    ORT_DISABLE_TELEMETRY=1 \
    BENCH_TARGET=cpu \
    BENCH_WORK=/work
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["/opt/edgesam-deploy/docker/bench.sh"]
