# Images to train and to serve: docker build --target serve --tag dl_jax-serve .
# The targets are train, train-cuda, train-tpu and serve. CUDA comes with the wheels of jax[cuda13]; the host has the driver.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints-py312-latest.txt pyproject.toml README.md LICENSE ./
COPY dl_jax dl_jax
RUN python -m venv /opt/dl_jax
ENV PATH=/opt/dl_jax/bin:$PATH

FROM build AS build-serve
RUN pip install --constraint constraints-py312-latest.txt '.[serve,litert]'

FROM build AS build-train
RUN pip install --constraint constraints-py312-latest.txt '.[bayes,clean,export,private,text,tune]' 'gcsfs>=2024.6'

FROM build-train AS build-train-cuda
RUN pip install --constraint constraints-py312-latest.txt '.[cuda]'

FROM build-train AS build-train-tpu
RUN pip install --constraint constraints-py312-latest.txt '.[tpu]'

# What runs has neither the sources of the package nor root's rights.
FROM python:3.12-slim AS base
RUN useradd --create-home --uid 10001 dl_jax
ENV PATH=/opt/dl_jax/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/dl_jax
USER 10001:10001

FROM base AS train
COPY --from=build-train /opt/dl_jax /opt/dl_jax
COPY experiments experiments
CMD ["python", "experiments/vision/lenet.py", "--dataset", "digits"]

FROM base AS train-cuda
COPY --from=build-train-cuda /opt/dl_jax /opt/dl_jax
COPY experiments experiments
CMD ["python", "experiments/vision/lenet.py", "--dataset", "digits"]

FROM base AS train-tpu
COPY --from=build-train-tpu /opt/dl_jax /opt/dl_jax
COPY experiments experiments
CMD ["python", "experiments/vision/lenet.py", "--dataset", "digits"]

# The file to serve and its record are mounted at /model, the token at /run/secrets.
FROM base AS serve
COPY --from=build-serve /opt/dl_jax /opt/dl_jax
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
ENTRYPOINT ["python", "-m", "dl_jax.serve"]
CMD ["/model/net.onnx", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
