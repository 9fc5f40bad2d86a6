/* A libnvidia-ml.so.1 of two 24 GiB GPUs. Its faults come from the environment:
   FAKE_NVML_INIT=CODE        nvmlInit answers CODE
   FAKE_NVML_GPU1=CODE        GPU 1 has no handle but CODE
   FAKE_NVML_NAME=BYTES       the name of both GPUs, as it stands */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { u64 total, free, used; } memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory2;

static int code(const char *name) { const char *set = getenv(name); return set ? atoi(set) : 0; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return code("FAKE_NVML_INIT"); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int result) { return result == 15 ? "GPU is lost" : "an error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index == 1 && code("FAKE_NVML_GPU1")) return code("FAKE_NVML_GPU1");
  *device = (void *)(size_t)(index + 1);
  return 0;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
  snprintf(text, size, "GPU-%zu", (size_t)device - 1);
  return 0;
}
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
  (void)device;
  strncpy(text, getenv("FAKE_NVML_NAME") ? getenv("FAKE_NVML_NAME") : "NVIDIA Test", size - 1);
  text[size - 1] = 0;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory *info) {
  (void)device;
  *info = (memory){24ull << 30, 23ull << 30, 1ull << 30};
  return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, memory2 *info) {
  (void)device;
  info->total = 24ull << 30; info->reserved = 0; info->free = 23ull << 30; info->used = 1ull << 30;
  return 0;
}
