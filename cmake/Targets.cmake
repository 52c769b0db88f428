# What every target of ours shares: warnings, sanitizers, the precompiled header.
add_library(corank_options INTERFACE)
target_include_directories(corank_options INTERFACE ${PROJECT_SOURCE_DIR})
set(warnings -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual)
if(CORANK_WERROR) # g++ 12 and 13 see these three in inlined std::string and std::vector code that is right
  list(APPEND warnings -Werror -Wno-error=array-bounds -Wno-error=stringop-overflow -Wno-error=restrict)
endif()
if(CMAKE_UNITY_BUILD) # a warning about headers, which there hits sources: each is included by its batch
  list(APPEND warnings -Wno-subobject-linkage)
endif()
target_compile_options(corank_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${warnings}>")
if(CORANK_ASAN)
  target_compile_options(corank_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined;-fno-sanitize=vptr;-fno-omit-frame-pointer;-Wno-maybe-uninitialized>")
  target_link_options(corank_options INTERFACE -fsanitize=address,undefined)
endif()
if(CORANK_TSAN) # -Wno-tsan: atomic_thread_fence of ATen's headers, which ThreadSanitizer does not see
  target_compile_options(corank_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=thread;-fno-omit-frame-pointer;-Wno-tsan;-Wno-maybe-uninitialized>")
  target_link_options(corank_options INTERFACE -fsanitize=thread)
endif()
if(CORANK_CUDA)
  target_compile_definitions(corank_options INTERFACE CORANK_HAS_CUDA=1)
endif()

# Debian 12 names the target yaml-cpp, later releases yaml-cpp::yaml-cpp.
if(TARGET yaml-cpp::yaml-cpp)
  set(CORANK_YAML yaml-cpp::yaml-cpp)
else()
  set(CORANK_YAML yaml-cpp)
endif()

# One precompiled header for all that includes ATen: it is most of a file's compile time.
add_library(corank_pch OBJECT ${PROJECT_SOURCE_DIR}/cmake/pch.cpp)
target_link_libraries(corank_pch PUBLIC corank_options corank::torch)
target_precompile_headers(corank_pch PRIVATE
  "$<$<COMPILE_LANGUAGE:CXX>:ATen/ATen.h>"
  "$<$<COMPILE_LANGUAGE:CXX>:torch/csrc/autograd/custom_function.h>"
  "$<$<COMPILE_LANGUAGE:CXX>:torch/csrc/autograd/autograd.h>")

# corank_library(name SOURCES ... [LINK ...]): one static library per folder.
function(corank_library name)
  cmake_parse_arguments(arg "" "" "SOURCES;LINK" ${ARGN})
  add_library(${name} STATIC ${arg_SOURCES})
  target_link_libraries(${name} PUBLIC corank_options corank::torch ${arg_LINK})
  target_precompile_headers(${name} REUSE_FROM corank_pch)
endfunction()
