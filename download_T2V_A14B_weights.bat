@echo off
rem Fetch the weights of Wan2.2-T2V-A14B (126 GB) into T2V_A14B_weights in the current folder.
rem Takes the flags of download_T2V_A14B_weights.py; run it again to go on where it was stopped.
setlocal
set "PYTHON="
where py >nul 2>nul && py -3 -c "" >nul 2>nul && set "PYTHON=py -3"
if not defined PYTHON where python >nul 2>nul && python -c "" >nul 2>nul && set "PYTHON=python"
if not defined PYTHON (
  echo error: Python was not found 1>&2
  echo hint: install Python 3.11 or newer from https://www.python.org/downloads/ 1>&2
  exit /b 2
)
%PYTHON% -c "import huggingface_hub, httpx2" >nul 2>nul || %PYTHON% -m pip install --upgrade "huggingface_hub>=2.4" 1>&2
%PYTHON% "%~dp0download_T2V_A14B_weights.py" %*
exit /b %ERRORLEVEL%
