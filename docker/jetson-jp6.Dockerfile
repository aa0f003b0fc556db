# Compiles and measures kits on a Jetson with JetPack 6.1 or 6.2 (TensorRT 10.3, Python 3.10). On the Jetson, from the
# root of the repository:
#   docker build -f docker/jetson-jp6.Dockerfile -t edgesam-deploy:jetson-jp6 .
# No PyTorch and no ONNX tools: kits come from `sam-export build --target` on a host.
ARG BASE_IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${BASE_IMAGE} AS build
# Where pip looks besides its default index.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# The star takes the distribution's security updates of that version.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv=3.10.6* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY docker/constraints.txt docker/
COPY engines engines
COPY export export
COPY edgesam_deploy edgesam_deploy
# TensorRT's Python bindings are JetPack's own: looked for, not imported, since a part of TensorRT (libnvdla_compiler)
# comes from the Jetson's system when a container starts. pip itself stays behind.
RUN python3 -m venv --system-site-packages /opt/venv \
    && PIP_CONSTRAINT=docker/constraints.txt \
        /opt/venv/bin/python -m pip install --no-cache-dir . \
    && /opt/venv/bin/python -c "import importlib.util as u; u.find_spec('tensorrt') or exit('BASE_IMAGE has no tensorrt')" \
    && /opt/venv/bin/python -m pip uninstall -y setuptools pip

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgesam-deploy, JetPack 6" \
    org.opencontainers.image.description="Compiles, verifies and measures Segment-Anything engines on Jetson Orin" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.revision="${REVISION}"
# The GPU's device files belong to the group video.
RUN useradd --uid 10001 --no-create-home --home-dir /work --shell /usr/sbin/nologin --groups video edgesam \
    && install -d -m 1777 /kits /results /work
COPY --from=build /opt/venv /opt/venv
COPY benchmarks/collect.py /opt/edgesam-deploy/benchmarks/
COPY docker/bench.sh /opt/edgesam-deploy/docker/
# Any user may run it (--user): name and home do not come from /etc/passwd.
ENV HOME=/work \
    USER=edgesam \
    PATH=/opt/venv/bin:$PATH \
    EDGESAM_IMAGE="docker/jetson-jp6.Dockerfile on ${BASE_IMAGE}" \
    EDGESAM_REVISION=${REVISION} \
    BENCH_KITS=/kits \
    BENCH_WORK=/work
# Without a group of its own here, so that the group video counts.
USER 10001
WORKDIR /work
ENTRYPOINT ["/opt/edgesam-deploy/docker/bench.sh"]
