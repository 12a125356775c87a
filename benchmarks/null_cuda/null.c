// A CUDA that does nothing: one shared library in the place of libcuda, libcudart, cuBLAS and the rest.
//
// It shows one GPU of compute capability 9.0 (NULL_CUDA_DEVICES: more). Device memory is address space that nothing
// touches; kernels are counted and not run; a wait returns at once. So the host's whole path from Python to the driver
// runs on a machine without a GPU, and costs what it costs but for the driver's own work. While a
// stream is captured into a graph, what would wait is refused, as a GPU refuses it.
//
// Here are the functions that have results. build.py makes the others: they return 0 and are remembered by name.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))
#define SUCCESS return 0

// ---- What was done, for whoever loads this library with ctypes ----

enum { LAUNCHES, WAITS, ALLOCATIONS, COPIES, FILLS, COUNTERS };
static _Atomic int64_t counters[COUNTERS];
EXPORT int64_t null_cuda_count(int counter) { return counters[counter]; }

EXPORT void null_cuda_launched(void) { counters[LAUNCHES]++; }

// Names of functions without a body that were called, in order of their first call.
static const char* unknown[1024];
static _Atomic int unknown_count;
EXPORT void null_cuda_called_unknown(const char* name) {
  for (int i = 0; i < unknown_count; ++i)
    if (!strcmp(unknown[i], name)) return;
  if (unknown_count < 1024) unknown[unknown_count++] = strdup(name);
}
EXPORT const char* null_cuda_unknown(int i) { return i < unknown_count ? unknown[i] : NULL; }

// Launches of kernels by this thread, in order, while it records: function, grid, threads, shared bytes, stream, how many
// parameters, then these as they lie in memory, 8 bytes of each. A launch does not say how many it has:
// `null_cuda_parameters` does, once for each function; of others none are recorded.
enum { HEAD = 8, MOST_PARAMETERS = 96, MOST_FUNCTIONS = 4096, MOST_RECORDED = 256 };
static struct { CUfunction function; int count; } parameters_of[MOST_FUNCTIONS];
static _Atomic int functions_known;
static pthread_mutex_t functions_lock = PTHREAD_MUTEX_INITIALIZER;
EXPORT void null_cuda_parameters(uint64_t function, int count) {
  pthread_mutex_lock(&functions_lock);
  if (functions_known == MOST_FUNCTIONS || count > MOST_PARAMETERS) abort();
  parameters_of[functions_known].function = (CUfunction)function;
  parameters_of[functions_known++].count = count;
  pthread_mutex_unlock(&functions_lock);
}

typedef uint64_t Recorded[HEAD + MOST_PARAMETERS];
static __thread Recorded* recorded;
static __thread int recorded_count, recording;
EXPORT void null_cuda_record(int on) {
  if (!recorded) recorded = calloc(MOST_RECORDED, sizeof *recorded);
  if (on) recorded_count = 0;
  recording = on;
}
EXPORT int null_cuda_recorded(void) { return recorded_count; }
EXPORT const uint64_t* null_cuda_launch(int i) { return recorded[i]; }

static void record(const void* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, const void* stream,
                   void** parameters) {
  null_cuda_launched();
  if (!recording || recorded_count == MOST_RECORDED) return;
  int count = 0;
  for (int i = functions_known; i-- && !count;)
    if (parameters_of[i].function == f) count = parameters_of[i].count;
  const uint64_t head[HEAD] = {(uintptr_t)f, x, y, z, threads, shared, (uintptr_t)stream, count};
  uint64_t* place = recorded[recorded_count++];
  memcpy(place, head, sizeof head);
  for (int i = 0; i < count; ++i) memcpy(&place[HEAD + i], parameters[i], 8);
}

static void* new_handle(void) {
  static _Atomic uintptr_t next = 0x10000;
  return (void*)(next += 16);
}

// ---- Devices ----

enum { MOST_DEVICES = 8 };
static __thread int device;
static int devices(void) {
  static int count;
  if (!count) {
    const char* text = getenv("NULL_CUDA_DEVICES");
    count = text ? atoi(text) : 1;
    if (count < 1 || count > MOST_DEVICES) {
      fprintf(stderr, "NULL_CUDA_DEVICES: expected 1 to %d, got %s\n", MOST_DEVICES, text);
      abort();
    }
  }
  return count;
}
static int lost;  // in a forked child, which has no driver as its parent had one
static CUcontext context_of(int which) { return (CUcontext)(uintptr_t)(0x1000 + which); }

static const int ATTRIBUTES[][2] = {  // of an H200
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 227 << 10},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 228 << 10},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 50 << 20},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
    {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
};
static int attribute(int which) {
  for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; ++i)
    if (ATTRIBUTES[i][0] == which) return ATTRIBUTES[i][1];
  return 0;
}

EXPORT cudaError_t cudaGetDeviceCount(int* count) { *count = devices(); SUCCESS; }
EXPORT cudaError_t cudaGetDevice(int* which) { *which = device; SUCCESS; }
EXPORT cudaError_t cudaSetDevice(int which) {
  if (which < 0 || which >= devices()) return cudaErrorInvalidDevice;
  device = which;
  SUCCESS;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int of) { *value = attribute(which); SUCCESS; }
#undef cudaGetDeviceProperties
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int of) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null");
  p->totalGlobalMem = 141ULL << 30;
  p->major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  p->warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  p->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  p->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  for (int i = 0; i < 3; ++i) {
    p->maxThreadsDim[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i);
    p->maxGridSize[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i);
  }
  p->sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->sharedMemPerBlockOptin = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  p->sharedMemPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p->l2CacheSize = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->textureAlignment = attribute(CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT);
  p->memPitch = 2147483647;
  p->totalConstMem = 65536;
  p->unifiedAddressing = p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
  SUCCESS;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int of) { snprintf(id, size, "0000:%02x:00.0", of); SUCCESS; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int one, int other) { *can = 0; SUCCESS; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { *least = 0; *most = -5; SUCCESS; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { *version = CUDA_VERSION; SUCCESS; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDA_VERSION; SUCCESS; }
EXPORT const char* cudaGetErrorString(cudaError_t error) { return error ? "refused by the null CUDA" : "no error"; }
EXPORT const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfNullCuda" : "cudaSuccess"; }

EXPORT CUresult cuDriverGetVersion(int* version) { *version = CUDA_VERSION; SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { *count = devices(); SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* found, int which) { *found = which; SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice of) { *value = attribute(which); SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice of) { *context = context_of(of); SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice of, unsigned* flags, int* active) { *flags = 0; *active = 1; SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { *context = context_of(device); SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { device = (uintptr_t)context - (uintptr_t)context_of(0); SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* which) { *which = device; return lost ? CUDA_ERROR_NOT_INITIALIZED : 0; }
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) { *text = cudaGetErrorString(error); SUCCESS; }
EXPORT CUresult cuGetErrorName(CUresult error, const char** text) { *text = cudaGetErrorName(error); SUCCESS; }

// ---- Memory: address space of each device, handed out upwards and never again ----

static const size_t ARENA = 1ULL << 42, GRANULE = 2 << 20;
static uintptr_t arena, next_of[MOST_DEVICES];
static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;

static void* allocated(size_t size) {
  counters[ALLOCATIONS]++;
  pthread_mutex_lock(&arena_lock);
  if (!arena) {
    void* space = mmap(NULL, devices() * ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
      perror("null CUDA: address space");
      abort();
    }
    arena = ((uintptr_t)space + GRANULE - 1) & ~(GRANULE - 1);
    for (int i = 0; i < devices(); ++i) next_of[i] = arena + i * ARENA;
  }
  uintptr_t result = next_of[device];
  next_of[device] += (size + GRANULE - 1) & ~(GRANULE - 1);
  if (next_of[device] > arena + (device + 1) * ARENA - GRANULE) abort();
  pthread_mutex_unlock(&arena_lock);
  return (void*)result;
}
static void forked(void) { lost = arena != 0; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forked); }

static int on_device(const void* p) {
  return arena && (uintptr_t)p >= arena && (uintptr_t)p < arena + devices() * ARENA - GRANULE;
}
// What the host reads of a device is 0, as far as it is small: nothing has computed it.
static void copy(void* to, const void* from, size_t size) {
  counters[COPIES]++;
  if (size <= 65536 && !on_device(to)) on_device(from) ? memset(to, 0, size) : memcpy(to, from, size);
}

EXPORT cudaError_t cudaMalloc(void** p, size_t size) { *p = allocated(size); SUCCESS; }
EXPORT cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t stream) { return cudaMalloc(p, size); }
EXPORT cudaError_t cudaHostAlloc(void** p, size_t size, unsigned flags) { return posix_memalign(p, 4096, size ? size : 1) ? cudaErrorMemoryAllocation : 0; }
EXPORT cudaError_t cudaFreeHost(void* p) { free(p); SUCCESS; }
EXPORT cudaError_t cudaFree(void* p) { SUCCESS; }
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) { SUCCESS; }
EXPORT cudaError_t cudaMemGetInfo(size_t* left, size_t* total) { *total = 141ULL << 30; *left = 140ULL << 30; SUCCESS; }
EXPORT cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) { return cudaMalloc(p, 65536); }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int of) { *pool = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* p) {
  memset(found, 0, sizeof *found);
  found->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  found->device = on_device(p) ? ((uintptr_t)p - arena) / ARENA : -1;
  found->devicePointer = found->hostPointer = (void*)p;
  SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr p) {
  if (!on_device((void*)p)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)data = p;
  SUCCESS;
}
EXPORT cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) { counters[FILLS]++; SUCCESS; }
EXPORT cudaError_t cudaMemset(void* p, int value, size_t size) { return cudaMemsetAsync(p, value, size, NULL); }
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { copy(to, from, size); SUCCESS; }

// ---- Streams, events, graphs ----

static _Atomic int capturing;
static int64_t captured_from;
static cudaError_t wait(void) {
  counters[WAITS]++;
  return capturing ? cudaErrorStreamCaptureUnsupported : 0;
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) { copy(to, from, size); return wait(); }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait(); }
EXPORT cudaError_t cudaDeviceSynchronize(void) { return wait(); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait(); }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) { return capturing ? cudaErrorStreamCaptureUnsupported : 0; }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { *stream = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) { *stream = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { *stream = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { *event = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { *event = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) { *ms = 0; SUCCESS; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) { *status = capturing; SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) { *status = capturing; SUCCESS; }
#undef cudaStreamGetCaptureInfo
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** before, const cudaGraphEdgeData** edges, size_t* count) {
  *status = capturing;
  if (id) *id = capturing;
  if (graph) *graph = (cudaGraph_t)0x5000;
  if (before) *before = NULL;
  if (count) *count = 0;
  SUCCESS;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = cudaStreamCaptureStatusActive;
  captured_from = counters[LAUNCHES];
  SUCCESS;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) { capturing = 0; *graph = (cudaGraph_t)0x5000; SUCCESS; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) { *count = counters[LAUNCHES] - captured_from; SUCCESS; }
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) { *exec = new_handle(); SUCCESS; }
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) { null_cuda_launched(); SUCCESS; }

// ---- Kernels ----

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 90;
  found->maxDynamicSharedSizeBytes = 48 << 10;
  SUCCESS;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads, size_t shared, unsigned flags) { *blocks = 4; SUCCESS; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads, size_t shared) { *blocks = 4; SUCCESS; }
EXPORT cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  record(f, grid.x, grid.y, grid.z, block.x * block.y * block.z, shared, stream, parameters);
  SUCCESS;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* l, const void* f, void** parameters) {
  return cudaLaunchKernel(f, l->gridDim, l->blockDim, parameters, l->dynamicSmemBytes, l->stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(f, grid, block, parameters, shared, stream);
}
// What nvcc's <<<>>> becomes.
static __thread struct { dim3 grid, block; size_t shared; void* stream; } configured;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured.grid = grid; configured.block = block; configured.shared = shared; configured.stream = stream;
  SUCCESS;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid; *block = configured.block; *shared = configured.shared; *(void**)stream = configured.stream;
  SUCCESS;
}
EXPORT void** __cudaRegisterFatBinary(void* binary) { static void* handle[1]; return handle; }
EXPORT char __cudaInitModule(void** handle) { return 1; }
EXPORT cudaError_t __cudaGetKernel(void** kernel, const void* f) { *kernel = (void*)f; SUCCESS; }
EXPORT cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, parameters, shared, stream);
}

// Modules and functions are those of one device: the last digit of their handles, which the current one has to be.
static int may_launch(CUfunction f) { return lost ? CUDA_ERROR_NOT_INITIALIZED : ((uintptr_t)f & 15) != device ? CUDA_ERROR_INVALID_HANDLE : 0; }
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) { *module = (CUmodule)((uintptr_t)new_handle() + device); SUCCESS; }
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) { return cuModuleLoadData(module, image); }
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  *f = (CUfunction)((uintptr_t)new_handle() + ((uintptr_t)module & 15));
  SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,
                               void** parameters, void** extra) {
  record(f, x, y, z, bx * by * bz, shared, stream, parameters);
  return may_launch(f);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* l, CUfunction f, void** parameters, void** extra) {
  record(f, l->gridDimX, l->gridDimY, l->gridDimZ, l->blockDimX * l->blockDimY * l->blockDimZ, l->sharedMemBytes, l->hStream, parameters);
  return may_launch(f);
}

// ---- Functions by name ----

static cudaError_t nothing(void) { SUCCESS; }
static void* by_name(const char* name) {
  void* f = dlsym(RTLD_DEFAULT, name);
  if (f) return f;
  null_cuda_called_unknown(name);
  return (void*)nothing;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
  *f = by_name(name);
  if (status) *status = cudaDriverEntryPointSuccess;
  SUCCESS;
}
#undef cudaGetDriverEntryPoint
EXPORT cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, status);
}
EXPORT CUresult cuGetProcAddress_v2(const char* name, void** f, int version, cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
  *f = by_name(name);
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  SUCCESS;
}

// ---- Libraries: handles and versions. Products are launches; build.py makes them. ----

#define CREATES(name) EXPORT int name(void** handle) { *handle = new_handle(); SUCCESS; }
CREATES(cublasCreate_v2)
CREATES(cublasLtCreate)
CREATES(cudnnCreate)
CREATES(cusolverDnCreate)
CREATES(cusparseCreate)
EXPORT int cublasGetVersion_v2(void* handle, int* version) { *version = 130101; SUCCESS; }
EXPORT size_t cublasLtGetVersion(void) { return 130101; }
EXPORT size_t cublasLtGetCudartVersion(void) { return CUDA_VERSION; }
EXPORT int cublasGetMathMode(void* handle, int* mode) { *mode = 0; SUCCESS; }
EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) { *mode = 0; SUCCESS; }
#define DESCRIBES(name, ...) EXPORT int name##Create(void** made, ##__VA_ARGS__) { *made = calloc(1, 256); SUCCESS; } EXPORT int name##Destroy(void* made) { free(made); SUCCESS; }
DESCRIBES(cublasLtMatmulDesc, int compute, int scale)
DESCRIBES(cublasLtMatrixLayout, int type, uint64_t rows, uint64_t columns, int64_t pitch)
DESCRIBES(cublasLtMatmulPreference)
// One algorithm, which needs no workspace: cublasLtMatmulHeuristicResult_t of zeros.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int wanted, void* results, int* found) {
  memset(results, 0, 64);
  *found = 1;
  SUCCESS;
}
EXPORT size_t cudnnGetVersion(void) { return 92400; }
EXPORT size_t cudnnGetCudartVersion(void) { return CUDA_VERSION; }
EXPORT int cudnnGetProperty(int which, int* value) { *value = which == 0 ? 9 : which == 1 ? 24 : 0; SUCCESS; }
EXPORT int ncclGetVersion(int* version) { *version = 23007; SUCCESS; }
EXPORT int cuptiGetVersion(uint32_t* version) { *version = 130000; SUCCESS; }
EXPORT int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; SUCCESS; }
