# syntax=docker/dockerfile:1
# docker build -t tokenmill .
# docker run --rm -v tokenmill:/home/tokenmill/.cache -p 8000:8000 tokenmill serve smollm2-135m --host 0.0.0.0

FROM python:3.11-slim AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --only-binary :all: "$(echo /wheels/*.whl)[server]"
RUN useradd --create-home --uid 1000 tokenmill \
 && install --directory --owner=tokenmill --group=tokenmill /home/tokenmill/.cache
USER tokenmill
WORKDIR /home/tokenmill
# Models and packed weights; mount a volume here to keep them.
VOLUME /home/tokenmill/.cache
EXPOSE 8000
ENTRYPOINT ["tokenmill"]
CMD ["doctor"]
