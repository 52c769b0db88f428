# LibTorch as a target of our own: the wheel's TorchConfig.cmake insists on a CUDA toolkit even where none is used.
# CORANK_TORCH names the folder; without it the cache of launch/setup is asked, then the torch of python3.
function(corank_find_torch result)
  set(candidates "${CORANK_TORCH}")
  set(cache "$ENV{CORANK_CACHE}")
  if(NOT cache)
    set(cache "$ENV{XDG_CACHE_HOME}")
    if(NOT cache)
      set(cache "$ENV{HOME}/.cache")
    endif()
    set(cache "${cache}/corank")
  endif()
  if(NOT CORANK_TORCH)
    list(APPEND candidates "${cache}/torch/torch")
    execute_process(
      COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE python_torch ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    list(APPEND candidates ${python_torch})
  endif()
  foreach(dir IN LISTS candidates)
    if(EXISTS "${dir}/include/ATen/ATen.h" AND EXISTS "${dir}/lib/libtorch_cpu.so")
      set(${result} "${dir}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "LibTorch 2.11 not found (looked in: ${candidates}). "
    "Run launch/setup, or name an existing one with -DCORANK_TORCH=DIR.")
endfunction()

corank_find_torch(CORANK_TORCH_DIR)
file(STRINGS "${CORANK_TORCH_DIR}/include/torch/headeronly/version.h" torch_version REGEX "define TORCH_VERSION ")
message(STATUS "LibTorch: ${CORANK_TORCH_DIR} ${torch_version}")

add_library(corank_torch INTERFACE)
add_library(corank::torch ALIAS corank_torch)
# Only LibTorch's own folders: the wheel's include/ also holds an fmt that is not the system's.
set(torch_include ${PROJECT_BINARY_DIR}/torch-include)
file(MAKE_DIRECTORY ${torch_include})
foreach(folder ATen c10 torch caffe2)
  file(CREATE_LINK ${CORANK_TORCH_DIR}/include/${folder} ${torch_include}/${folder} SYMBOLIC)
endforeach()
target_include_directories(corank_torch SYSTEM INTERFACE ${torch_include} ${torch_include}/torch/csrc/api/include)

# The wheel's libraries find each other and the nvidia-* wheels beside them through rpath; the linker must not insist
# on the NVIDIA libraries that a machine without a GPU does not have.
file(GLOB nvidia_libs LIST_DIRECTORIES true "${CORANK_TORCH_DIR}/../nvidia/*/lib")
set(torch_rpath "${CORANK_TORCH_DIR}/lib" ${nvidia_libs})
target_link_directories(corank_torch INTERFACE ${CORANK_TORCH_DIR}/lib)
target_link_libraries(corank_torch INTERFACE torch_cpu c10)
foreach(dir IN LISTS torch_rpath)
  target_link_options(corank_torch INTERFACE "LINKER:-rpath,${dir}")
endforeach()
target_link_options(corank_torch INTERFACE "LINKER:--unresolved-symbols=ignore-in-shared-libs")

if(CORANK_CUDA)
  # --no-as-needed: nothing names a symbol of torch_cuda, yet its kernels register themselves when it is loaded.
  target_link_libraries(corank_torch INTERFACE
    "-Wl,--no-as-needed" torch torch_cuda c10_cuda "-Wl,--as-needed" CUDA::cudart)
  find_path(CORANK_NCCL_INCLUDE nccl.h
    HINTS ${CORANK_TORCH_DIR}/../nvidia/nccl/include ${CUDAToolkit_INCLUDE_DIRS} REQUIRED)
  find_library(CORANK_NCCL_LIBRARY NAMES libnccl.so.2 nccl libnccl.so
    HINTS ${CORANK_TORCH_DIR}/../nvidia/nccl/lib ${CUDAToolkit_LIBRARY_DIR} REQUIRED)
  target_include_directories(corank_torch SYSTEM INTERFACE ${CORANK_NCCL_INCLUDE})
  target_link_libraries(corank_torch INTERFACE ${CORANK_NCCL_LIBRARY})
endif()
